"""Training examples are pure functions of (seed, global index), however they are divided."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ediffi.conditioning import StreamConfig
from ediffi.shards import Sample
from ediffi.train.config import TrainConfig
from ediffi.train.data import Batch, RankBatches, TrainingExamples, draw, load_batches
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
