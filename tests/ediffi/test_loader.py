"""The loader's stream is one, however many ranks, workers, batches and restarts share it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ediffi.loader import JoinedLoader, StateMismatch
from ediffi.shards import JoinedShards, Sample, ShardFile, ShardRef, ShardWriter, encode_tensors
from tests.ediffi.test_shards import encoded, picture_of

NUM_SAMPLES = 30


def keys_of(samples: Sequence[Sample]) -> list[int]:
    return [int(sample.key) for sample in samples]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> JoinedShards:
    """Thirty samples in three shards of different sizes."""
    root = tmp_path_factory.mktemp("shards")
    refs, number = [], 0
    for name, size in (("0", 7), ("1", 13), ("2", 10)):
        images, tokens = root / f"{name}.tar", root / f"{name}-t5.tar"
        with ShardWriter(images) as image_writer, ShardWriter(tokens) as token_writer:
            for _ in range(size):
                picture = encoded(picture_of(number))
                image_writer.write(f"{number:02d}", {"png": picture, "txt": b"a"})
                tensors = {"tokens": torch.full((2, 3), float(number))}
                token_writer.write(f"{number:02d}", {"safetensors": encode_tensors(tensors)})
                number += 1
        embeddings = {"t5": ShardFile(tokens)}
        refs.append(
            ShardRef(name=name, images=ShardFile(images), embeddings=embeddings, num_samples=size)
        )
    return JoinedShards(refs, image_px=4)


def make_loader(samples: JoinedShards, **changes: Any) -> JoinedLoader[list[int]]:
    settings = {"collate": keys_of, "seed": 5, "batch_samples": 4, "window_shards": 2} | changes
    return JoinedLoader(samples, **settings)


def epochs(loader: JoinedLoader[list[int]], num_epochs: int) -> list[list[list[int]]]:
    return [list(loader) for _ in range(num_epochs)]


def flat(batches: list[list[int]]) -> list[int]:
    return [key for batch in batches for key in batch]


def test_every_epoch_shows_every_sample_once(samples: JoinedShards) -> None:
    """Over two epochs, with batches that straddle them, the stream is two permutations."""
    loader = make_loader(samples)
    lengths = []
    stream = []
    for _ in range(2):
        lengths.append(len(loader))
        stream += flat(list(loader))
    assert lengths == [8, 7]  # 30 = 7 x 4 + 2: the eighth batch takes two of the next epoch
    assert sorted(stream[:NUM_SAMPLES]) == sorted(stream[NUM_SAMPLES:60]) == list(range(30))
    assert stream[:NUM_SAMPLES] != stream[NUM_SAMPLES:60]


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_take_equal_steps_and_share_the_stream(
    samples: JoinedShards, world_size: int
) -> None:
    """Each step's parts, rank by rank, are the batch that a single process gets."""
    alone = epochs(make_loader(samples, batch_samples=6), 3)
    ranks = [
        epochs(make_loader(samples, batch_samples=6, rank=rank, world_size=world_size), 3)
        for rank in range(world_size)
    ]
    together = [[flat(list(parts)) for parts in zip(*epoch, strict=True)] for epoch in zip(*ranks)]
    assert together == alone


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_steps", [0, 1, 5, 8, 11])
def test_stopping_anywhere_and_going_on_changes_nothing(
    samples: JoinedShards, num_workers: int, num_steps: int
) -> None:
    """The state counts what was yielded: a new loader goes on with exactly the next batch."""
    expected = flat(flat_epochs(make_loader(samples), 3))
    first = make_loader(samples, num_workers=num_workers)
    taken: list[list[int]] = []
    while len(taken) < num_steps:
        for batch in first:
            taken.append(batch)
            if len(taken) == num_steps:
                break
    second = make_loader(samples, num_workers=num_workers)
    second.load_state_dict(first.state_dict())
    taken += flat_epochs(second, 3)
    assert flat(taken)[: len(expected)] == expected


def flat_epochs(loader: JoinedLoader[list[int]], num_epochs: int) -> list[list[int]]:
    return [batch for epoch in epochs(loader, num_epochs) for batch in epoch]


def test_resuming_on_other_ranks_with_other_batches_goes_on(samples: JoinedShards) -> None:
    """From one rank with batches of four to two ranks with batches of ten: one stream."""
    expected = flat(flat_epochs(make_loader(samples), 3))
    first = make_loader(samples)
    taken = [next(iter(first)) for _ in range(3)]
    ranks = [make_loader(samples, batch_samples=10, rank=rank, world_size=2) for rank in range(2)]
    for loader in ranks:
        loader.load_state_dict(first.state_dict())
    for parts in zip(*(flat_epochs(loader, 2) for loader in ranks), strict=True):
        taken += parts
    assert flat(taken)[: len(expected)] == expected[: len(flat(taken))]


def test_leaving_a_loop_early_skips_nothing(samples: JoinedShards) -> None:
    """`break` and another loop go on with the next batch, whatever workers had prepared."""
    expected = flat_epochs(make_loader(samples), 1)
    loader = make_loader(samples, num_workers=2)
    taken = []
    for batch in loader:
        taken.append(batch)
        if len(taken) == 3:
            break
    taken += list(loader)
    assert taken == expected


def test_far_position_is_as_near_as_the_first(samples: JoinedShards) -> None:
    """A position in the millionth epoch is reached without going there."""
    loader = make_loader(samples)
    state = loader.state_dict() | {"num_yielded": 30 * 10**6 + 4}
    loader.load_state_dict(state)
    assert loader.epoch == 10**6
    assert len(loader) == 7
    assert loader.order[30 * 10**6 + 4] == next(iter(loader))[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 6}, "seed of the saved position is 5, of this loader 6"),
        ({"window_shards": 3}, "window_shards of the saved position is 2, of this loader 3"),
    ],
)
def test_state_of_another_order_is_refused(samples: JoinedShards, changes, message) -> None:
    """The message names the field and both values."""
    state = make_loader(samples).state_dict()
    with pytest.raises(StateMismatch, match=message):
        make_loader(samples, **changes).load_state_dict(state)


def test_damaged_state_is_refused(samples: JoinedShards) -> None:
    """A state without a version or with a position that is none says what it must have."""
    loader = make_loader(samples)
    with pytest.raises(StateMismatch, match="version of the saved position is None"):
        loader.load_state_dict({})
    with pytest.raises(StateMismatch, match="num_yielded must be a number of samples, got -4"):
        loader.load_state_dict(loader.state_dict() | {"num_yielded": -4})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_samples": 5, "world_size": 2}, "multiple of world_size = 2.*got 5"),
        ({"batch_samples": 0}, "batch_samples must be"),
        ({"rank": 1}, r"rank must be in \[0, world_size = 1\), got 1"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"prefetch_batches": 0}, "prefetch_batches must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(samples: JoinedShards, changes, message) -> None:
    """Errors name the argument, the limit and what was given."""
    with pytest.raises(ValueError, match=message):
        make_loader(samples, **changes)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damage_ends_the_loop_and_is_not_stepped_over(tmp_path: Path, num_workers: int) -> None:
    """A picture that cannot be read is the loop's error, and again when the loop is tried again."""
    path = tmp_path / "0.tar"
    with ShardWriter(path) as writer:
        for number in range(4):
            picture = encoded(picture_of(number)) if number != 2 else b"no picture"
            writer.write(f"{number}", {"png": picture, "txt": b"a"})
    ref = ShardRef(name="0", images=ShardFile(path), embeddings={}, num_samples=4)
    dataset = JoinedShards([ref], image_px=4)
    loader = make_loader(dataset, num_workers=num_workers, batch_samples=1)
    for _ in range(2):
        with pytest.raises(ValueError, match="image of '2': image_undecodable"):
            list(loader)
    assert loader.order[loader.state_dict()["num_yielded"]] == 2
