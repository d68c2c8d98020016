"""The averages kept while training, against their closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ediffi.power_ema import gamma_of
from ediffi.train.config import TrainConfig
from ediffi.train.ema import Averages, half_life_decay, power_kind
from ediffi.train.state import Fragment

BATCH = 10
STDS = (0.05, 0.1, 0.12345)


def make_config(**changes: Any) -> TrainConfig:
    """Batches of ten images, a half-life of 200 without ramp."""
    values = {
        "total_images": 1000,
        "batch_images": BATCH,
        "micro_batch_images": BATCH,
        "ema_half_life_images": 200,
        "ema_ramp_fraction": 1e9,
        "checkpoint_images": 1000,
        "log_images": 1000,
    }
    return TrainConfig(**{**values, **changes})


POWER = make_config(ema_profile="power", ema_half_life_images=0, ema_track_stds=STDS)


def fragments_of(values: Sequence[float]) -> list[Fragment]:
    """Two pieces of a parameter `a` and one of `b`, all filled with a first value."""
    return [
        Fragment(name, start, torch.full((size,), values[0]))
        for name, start, size in (("a", 0, 3), ("a", 3, 5), ("b", 2, 1))
    ]


def averaged(
    config: TrainConfig, history: Sequence[float], images_before: int = 0
) -> dict[str, float]:
    """Average by kind of weights that begin at history[0] and take one value after each step."""
    fragments = fragments_of(history)
    averages = Averages(config, fragments, images_before=images_before)
    for step, value in enumerate(history[1:], start=1):
        for fragment in fragments:
            fragment.weights.fill_(value)
        averages.update(step * BATCH)
    found = {}
    for kind, tensors in averages.tensors().items():
        whole = torch.cat(tensors)
        assert (whole == whole[0]).all()
        found[kind] = whole[0].item()
    return found


HISTORY = np.random.default_rng(0).standard_normal(61).tolist()


@pytest.mark.parametrize(("images", "left"), [(200, 0.5), (400, 0.25), (100, 0.5**0.5)])
def test_old_weights_halve_every_half_life(images: int, left: float) -> None:
    """Without ramp, what is left of the first weights after n images is 0.5^(n / half-life)."""
    found = averaged(make_config(), [0.0] + [1.0] * (images // BATCH))
    assert found == {"ema": pytest.approx(1 - left)}


def test_half_life_average_is_the_weighted_sum_of_its_history() -> None:
    """With the ramp, each step's weights count (1 - d_k) times all later decays."""
    config = make_config(ema_ramp_fraction=0.05)
    decays = np.array([half_life_decay(config, step * BATCH) for step in range(1, 61)])
    left = np.append(np.cumprod(decays[::-1])[::-1], 1.0)  # of what entered before each step
    expected = left[0] * HISTORY[0] + ((1 - decays) * left[1:]) @ HISTORY[1:]
    assert averaged(config, HISTORY)["ema"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("images_before", [0, 150])
def test_power_average_is_the_weighted_sum_of_its_history(images_before: int) -> None:
    """Each step counts the profile's integral over it; the first weights what is older still."""
    found = averaged(POWER, HISTORY, images_before)
    edges = images_before + BATCH * np.arange(61)
    for std in STDS:
        below = (edges / edges[-1]) ** (gamma_of(std) + 1)
        expected = below[0] * HISTORY[0] + np.diff(below) @ HISTORY[1:]
        assert found[power_kind(std)] == pytest.approx(expected, rel=1e-5)


def test_power_average_forgets_where_it_began() -> None:
    """The first step replaces the random initial weights altogether."""
    assert averaged(POWER, [1e6, 0.5]) == {power_kind(std): 0.5 for std in STDS}


def test_ramp_shortens_the_half_life_to_a_fraction_of_the_images_seen() -> None:
    """At 100 images and ramp 0.05 the half-life is 5; from 4000 on it is the full 200."""
    config = make_config(ema_ramp_fraction=0.05)
    assert half_life_decay(config, 100) == pytest.approx(0.5 ** (10 / 5))
    assert half_life_decay(config, 4000) == half_life_decay(config, 10**9)
    assert half_life_decay(config, 4000) == pytest.approx(0.5 ** (10 / 200))


def test_an_average_that_is_carried_on_does_not_ramp_again() -> None:
    """After 4000 images of its ancestors it forgets with the full half-life from the first step."""
    config = make_config(ema_ramp_fraction=0.05)
    found = averaged(config, [0.0, 1.0], images_before=4000)["ema"]
    assert found == pytest.approx(1 - 0.5 ** (10 / 200))


def test_paper_decay_is_a_half_life_of_14_million_images() -> None:
    """EMA 0.9999 at batch 2048, the paper's, in our terms."""
    config = TrainConfig(
        total_images=10**9,
        batch_images=2048,
        ema_half_life_images=14_194_848,
        checkpoint_images=1,
        log_images=1,
    )
    assert half_life_decay(config, 10**10) == pytest.approx(0.9999, abs=1e-9)


@pytest.mark.parametrize("num_parts", [1, 2, 7])
def test_cutting_weights_into_fragments_changes_no_bit(num_parts: int) -> None:
    """However the weights are shared out, each average is torch's lerp of the whole parameter."""
    config = make_config(ema_ramp_fraction=0.05)
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(1003, generator=generator) for _ in range(5)]
    weights = steps[0].clone()
    parts = [Fragment("a", 0, part) for part in weights.tensor_split(num_parts)]
    averages, expected = Averages(config, parts), weights.clone()
    for step, value in enumerate(steps[1:], start=1):
        weights.copy_(value)
        averages.update(step * BATCH)
        expected.lerp_(value, 1 - half_life_decay(config, step * BATCH))
    assert torch.equal(torch.cat(averages.tensors()["ema"]), expected)


@pytest.mark.parametrize("config", [make_config(), POWER], ids=["half_life", "power"])
def test_averages_load_bit_by_bit(config: TrainConfig) -> None:
    """What `tensors` gave comes back through any reader, each fragment its own piece."""
    fragments = fragments_of([0.3])
    written = {
        (kind, name): torch.randn(20, generator=torch.Generator().manual_seed(len(kind + name)))
        for kind in Averages(config, fragments).kinds
        for name in ("a", "b")
    }

    def read(kind: str, name: str, start: int, num_elements: int) -> Tensor:
        return written[kind, name][start : start + num_elements]

    averages = Averages(config, fragments)
    averages.load(read)
    for kind, tensors in averages.tensors().items():
        for fragment, tensor in zip(fragments, tensors):
            end = fragment.start + tensor.numel()
            assert torch.equal(tensor, written[kind, fragment.name][fragment.start : end])


def test_a_rank_without_weights_has_nothing_to_do() -> None:
    """With more ranks than weights, an average of nothing is updated without an error."""
    averages = Averages(make_config(), [])
    averages.update(BATCH)
    assert averages.tensors() == {"ema": []}
