"""Training examples are pure functions of (seed, global index), however they are divided."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ediffi.conditioning import StreamConfig
from ediffi.degradation import DegradationConfig, LowRes, degrade
from ediffi.shards import Sample
from ediffi.train.config import TrainConfig
from ediffi.train.data import (
    Batch,
    RankBatches,
    TrainingExamples,
    centre_patch,
    draw,
    load_batches,
    low_res_of,
    random_patch,
    to_unit_range,
)
from ediffi.train.engine import Worker

STREAMS = (
    StreamConfig(name="t5", token_width=2, dropout=0.25),
    StreamConfig(name="clip", pooled_width=3, dropout=0.9),
)
CONFIG = TrainConfig(
    total_images=48,
    batch_images=24,
    micro_batch_images=6,
    ema_half_life_images=1,
    checkpoint_images=1,
    log_images=1,
)


class Samples:
    """Seven pictures whose left column is their index and whose embeddings are ones."""

    def __getitem__(self, sample_index: int) -> Sample:
        image = torch.zeros(3, 4, 4, dtype=torch.uint8)
        image[:, :, 0] = sample_index + 1
        tokens = torch.ones(sample_index % 3 + 1, 2)
        streams = {"t5": {"tokens": tokens}, "clip": {"pooled": torch.ones(3)}}
        return Sample(key=str(sample_index), caption="", image=image, streams=streams)

    def __getitems__(self, sample_indices: list[int]) -> list[Sample]:
        return [self[index] for index in sample_indices]


class Order:
    """Every sample in turn."""

    def __getitem__(self, global_index: int) -> int:
        return global_index % 7


def make_examples(**changes: Any) -> TrainingExamples:
    """Seeded and mirrored examples of the seven pictures."""
    settings = {"streams": STREAMS, "seed": 3, "flip": True} | changes
    return TrainingExamples(Samples(), Order(), **settings)


def batches(start_images: int = 0, rank: int = 0, world_size: int = 1) -> list[Batch]:
    """All micro-batches of one rank."""
    worker = Worker(rank, world_size, torch.device("cpu"))
    return list(load_batches(make_examples(), CONFIG, worker, start_images))


def stacked(parts: list[Batch]) -> list[Tensor]:
    """Pictures, noise levels, noise and pooled embeddings of several batches."""
    pooled = [part.conditioning.streams["clip"].pooled_BD for part in parts]
    columns = zip(*[(b.images_BCHW, b.u_B, b.noise_BCHW, p) for b, p in zip(parts, pooled)])
    return [torch.cat(column) for column in columns]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    """Bit by bit."""
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_example_depends_on_seed_and_index_alone() -> None:
    """Asked again, in another order and by another object, an example is the same, bit by bit."""
    first, again = make_examples(), make_examples()
    _ = [again[index] for index in (40, 2, 9)]

    a, b = first[9], again[9]

    assert (a.u, a.keep) == (b.u, b.keep)
    assert torch.equal(a.noise_CHW, b.noise_CHW)
    assert torch.equal(a.image_CHW, b.image_CHW)
    assert a.u != first[10].u
    assert a.u != make_examples(seed=4)[9].u


def test_draws_have_their_distributions() -> None:
    """Over 4000 examples: uniform u, fair coin, standard normal noise, dropout as configured."""
    draws = [draw(0, index, (3, 2, 2), 2) for index in range(4000)]

    u = np.sort([d.u for d in draws])
    assert np.abs(u - np.linspace(0, 1, 4000)).max() < 0.03  # Kolmogorov-Smirnov at 0.1 %
    assert np.mean([d.flip for d in draws]) == pytest.approx(0.5, abs=0.03)
    noise = np.stack([d.noise_CHW for d in draws])
    assert (noise.mean(), noise.std()) == pytest.approx((0, 1), abs=0.02)
    kept = np.mean([list(make_examples()[index].keep.values()) for index in range(4000)], axis=0)
    assert kept == pytest.approx([0.75, 0.1], abs=0.03)


def test_another_stream_changes_no_other_draw() -> None:
    """Runs with and without a further encoder stay comparable: same noise at same levels."""
    one, two = draw(1, 5, (3, 2, 2), 1), draw(1, 5, (3, 2, 2), 2)

    assert (one.u, one.flip, one.keep[0]) == (two.u, two.flip, two.keep[0])
    assert np.array_equal(one.noise_CHW, two.noise_CHW)


def test_pictures_are_scaled_to_plus_minus_one_and_mirrored_by_their_coin() -> None:
    """Byte 0 becomes -1; the marked column is on the right exactly where the coin says so."""
    flips = [draw(3, index, (3, 4, 4), 2).flip for index in range(7)]
    assert len(set(flips)) == 2
    for index, flip in enumerate(flips):
        image_CHW = make_examples()[index].image_CHW
        marked, plain = (-1, 0) if flip else (0, -1)
        assert image_CHW[0, 0, marked] == torch.tensor((index + 1) / 127.5 - 1)
        assert image_CHW[0, 0, plain] == -1
    assert torch.equal(make_examples(flip=False)[0].image_CHW, Samples()[0].image / 127.5 - 1)


def test_dropped_streams_are_zero_in_the_batch() -> None:
    """Embeddings are whole ones where kept and zeros, masked, where dropped."""
    (batch, *_) = batches()
    keep = [make_examples()[index].keep for index in range(6)]

    t5, clip = batch.conditioning.streams["t5"], batch.conditioning.streams["clip"]

    assert t5.mask_BT.any(1).tolist() == [k["t5"] for k in keep]
    assert t5.tokens_BTD.bool().any(2).any(1).tolist() == [k["t5"] for k in keep]
    assert clip.pooled_BD.bool().all(1).tolist() == [k["clip"] for k in keep]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_out_every_batch(world_size: int) -> None:
    """The ranks' parts of each batch, in turn, are the batches of a single process."""
    ranks = [batches(rank=rank, world_size=world_size) for rank in range(world_size)]
    per_step = len(ranks[0]) // 2
    in_turn = [
        batch
        for step in range(2)
        for part in ranks
        for batch in part[step * per_step : (step + 1) * per_step]
    ]

    assert_equal(stacked(in_turn), stacked(batches()))


def test_resumed_batches_are_the_rest() -> None:
    """Starting at image 24 gives the second half of the examples."""
    expected = [column[24:] for column in stacked(batches())]

    assert_equal(stacked(batches(start_images=24)), expected)


def test_data_workers_change_nothing() -> None:
    """Two worker processes deliver the same batches in the same order."""
    worker = Worker(0, 1, torch.device("cpu"))
    config = TrainConfig(**(vars(CONFIG) | {"data_workers": 2}))

    assert_equal(
        stacked(list(load_batches(make_examples(), config, worker, 0))), stacked(batches())
    )


def test_rank_batches_know_their_number() -> None:
    """Two steps of four micro-batches; half as many for one of two ranks."""
    lengths = [
        len(RankBatches(CONFIG, start_images=0, rank=0, world_size=world)) for world in (1, 2)
    ]
    assert lengths == [8, 4]


CLEAN = LowRes(factor=2, degradation=DegradationConfig(kind="none"))


class LargeSamples(Samples):
    """Seven pictures of 12 px in which every pixel is another colour."""

    def __getitem__(self, sample_index: int) -> Sample:
        small = super().__getitem__(sample_index)
        pixels = torch.arange(144, dtype=torch.uint8).view(12, 12)
        image = torch.stack([pixels, pixels + 100, pixels + sample_index])
        return Sample(key=small.key, caption="", image=image, streams=small.streams)


def large_examples(**changes: Any) -> TrainingExamples:
    """Seeded and mirrored examples of the seven large pictures."""
    settings = {"streams": STREAMS, "seed": 3, "flip": True} | changes
    return TrainingExamples(LargeSamples(), Order(), **settings)


def test_patches_and_degradation_change_no_other_draw() -> None:
    """Mirroring, noise level, noise and dropout are the same draws for every kind of training."""
    small, large = make_examples()[9], large_examples(patch_px=4, low_res=LowRes(factor=2))[9]
    assert (small.u, small.keep) == (large.u, large.keep)
    assert torch.equal(small.noise_CHW, large.noise_CHW)


def test_a_patch_depends_on_seed_and_index_alone() -> None:
    """Asked again it is the same; over many examples every place is cut, equally often."""
    image = LargeSamples()[0].image
    corners = [
        int(random_patch(image, 8, seed=3, global_index=index)[0, 0, 0]) for index in range(2000)
    ]
    again = random_patch(image, 8, seed=3, global_index=7)
    assert int(again[0, 0, 0]) == corners[7]
    assert again.shape == (3, 8, 8)
    places, counts = np.unique(corners, return_counts=True)
    assert places.tolist() == [12 * top + left for top in range(5) for left in range(5)]
    assert counts.min() > 40  # 80 expected at each of 25 places


def test_low_resolution_input_belongs_to_patch_and_side() -> None:
    """It is the reduction of just the patch that is trained on, mirrored if that is."""
    flips = [draw(3, index, (3, 8, 8), 2).flip for index in range(4)]
    assert len(set(flips)) == 2
    for index in range(4):
        example = large_examples(patch_px=8, low_res=CLEAN)[index]
        assert example.image_CHW.shape == (3, 8, 8)
        assert example.low_res_CHW is not None
        picture = ((example.image_CHW + 1) / 2).numpy()
        expected = degrade(picture, CLEAN, np.random.default_rng(0)) * 2 - 1
        assert torch.equal(example.low_res_CHW, torch.from_numpy(expected))


def test_random_degradation_is_a_function_of_seed_and_index() -> None:
    """Bit by bit the same in another object and order; different for another index."""
    low_res = LowRes(factor=2)
    first, again = large_examples(low_res=low_res), large_examples(low_res=low_res)
    _ = [again[index] for index in (40, 2)]
    assert first[9].low_res_CHW is not None
    assert torch.equal(first[9].low_res_CHW, again[9].low_res_CHW)
    assert not torch.equal(first[9].low_res_CHW, first[16].low_res_CHW)  # the same sample


def test_batches_carry_low_resolution_pictures_in_their_conditioning() -> None:
    """One for every sample, also where all streams are dropped; base batches have none."""
    worker = Worker(0, 1, torch.device("cpu"))
    examples = large_examples(patch_px=4, low_res=CLEAN)
    for number, batch in enumerate(load_batches(examples, CONFIG, worker, 0)):
        low_res_BCHW = batch.to(worker.device).conditioning.low_res_BCHW
        expected = [examples[6 * number + i].low_res_CHW for i in range(6)]
        assert torch.equal(low_res_BCHW, torch.stack(expected))
    assert batches()[0].conditioning.low_res_BCHW is None


def test_held_out_pictures_are_always_degraded_alike() -> None:
    """A held-out sample's low-resolution picture depends on its index, not on who asks."""
    image, low_res = LargeSamples()[0].image, LowRes(factor=2)
    first = low_res_of(image, low_res, 5)
    assert torch.equal(first, low_res_of(image, low_res, 5))
    assert not torch.equal(first, low_res_of(image, low_res, 6))
    assert first.shape == (3, 6, 6)
    assert first.min() >= -1
    assert first.max() <= 1


def test_centre_patch_lies_in_the_middle() -> None:
    """Four pixels are left on every side."""
    image = LargeSamples()[0].image
    assert torch.equal(centre_patch(image, 4), image[:, 4:8, 4:8])
    assert torch.equal(centre_patch(image, 12), image)


def test_a_picture_smaller_than_its_patch_is_refused() -> None:
    """The message names both sizes and what to do."""
    with pytest.raises(ValueError, match=r"patch of 16 px must fit .* got 12 x 12 px: read"):
        large_examples(patch_px=16)[0]


def test_bytes_become_the_unit_range() -> None:
    """0 is -1, 255 is 1."""
    assert to_unit_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
