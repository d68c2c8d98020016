"""The moving average against its closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ediffi.train.config import TrainConfig
from ediffi.train.ema import EMA, ema_decay


def make_config(half_life_images: int, ramp_fraction: float) -> TrainConfig:
    """Batches of ten images."""
    return TrainConfig(
        total_images=1000,
        batch_images=10,
        micro_batch_images=10,
        ema_half_life_images=half_life_images,
        ema_ramp_fraction=ramp_fraction,
        checkpoint_images=1000,
        log_images=1000,
    )


def averaged(module: nn.Module, config: TrainConfig, num_steps: int) -> dict[str, torch.Tensor]:
    """Average of weights that start at zero and are one ever after."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        ema = EMA(module)
        for parameter in module.parameters():
            parameter.fill_(1)
    for step in range(1, num_steps + 1):
        ema.update(ema_decay(config, step * config.batch_images))
    return ema.gather()


@pytest.mark.parametrize(("images", "left"), [(200, 0.5), (400, 0.25), (100, 0.5**0.5)])
def test_old_weights_halve_every_half_life(images: int, left: float) -> None:
    """Without ramp, what is left of the first weights after n images is 0.5^(n / half-life)."""
    average = averaged(nn.Linear(2, 3), make_config(200, 1e9), images // 10)

    for weight in average.values():
        torch.testing.assert_close(1 - weight, torch.full_like(weight, left))


def test_ramp_shortens_the_half_life_to_a_fraction_of_the_images_seen() -> None:
    """At 100 images and ramp 0.05 the half-life is 5; from 4000 on it is the full 200."""
    config = make_config(200, 0.05)

    assert ema_decay(config, 100) == pytest.approx(0.5 ** (10 / 5))
    assert ema_decay(config, 4000) == ema_decay(config, 10**9) == pytest.approx(0.5 ** (10 / 200))


def test_paper_decay_is_a_half_life_of_14_million_images() -> None:
    """EMA 0.9999 at batch 2048, the paper's, in our terms."""
    config = TrainConfig(
        total_images=10**9,
        batch_images=2048,
        ema_half_life_images=14_194_848,
        checkpoint_images=1,
        log_images=1,
    )

    assert ema_decay(config, 10**10) == pytest.approx(0.9999, abs=1e-9)


def test_gathered_average_loads_into_another() -> None:
    """Persistent buffers come along; the average survives the round trip bit by bit."""
    module = nn.BatchNorm1d(4)
    module.running_mean.fill_(7)

    state = averaged(module, make_config(200, 1e9), 5)
    other = EMA(nn.BatchNorm1d(4))
    other.load(state)

    assert state.keys() == module.state_dict().keys()
    assert torch.equal(state["running_mean"], module.running_mean)
    assert torch.equal(other.gather()["weight"], state["weight"])
