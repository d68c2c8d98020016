"""The order of samples is a permutation per epoch and a pure function of the index."""

import random
import time
from itertools import pairwise

import numpy as np
import pytest

from ediffi.sample_order import SampleOrder

SIZES = {
    "even": [5] * 12,
    "uneven": [1, 7, 0, 30, 2, 11, 3, 0, 0, 9, 4],
    "single": [40],
    "empty at both ends": [0, 6, 0],
}


def epoch(order: SampleOrder, epoch_index: int) -> list[int]:
    start = epoch_index * order.num_samples
    return [order[start + position] for position in range(order.num_samples)]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("window_shards", [1, 3, 100])
def test_every_epoch_is_a_permutation(sizes, window_shards):
    """Every sample comes exactly once per epoch, for any shape of the data."""
    order = SampleOrder(sizes, seed=3, window_shards=window_shards)
    for epoch_index in (0, 1, 17):
        assert sorted(epoch(order, epoch_index)) == list(range(sum(sizes)))


def test_epochs_and_seeds_differ():
    """No two of several epochs and seeds share their order."""
    orders = [
        tuple(epoch(SampleOrder(SIZES["even"], seed=seed), epoch_index))
        for seed in (0, 1, 2**63)
        for epoch_index in range(3)
    ]
    assert len(set(orders)) == len(orders)


def test_random_access_equals_sequential_access():
    """Jumping about gives what walking gives: no state leaks from one call to the next."""
    order = SampleOrder(SIZES["uneven"], seed=5, window_shards=3)
    walked = [order[i] for i in range(4 * order.num_samples)]
    jumps = random.Random(0).choices(range(len(walked)), k=500)
    assert [order[i] for i in jumps] == [walked[i] for i in jumps]
    last = len(walked) - 1
    assert SampleOrder(SIZES["uneven"], seed=5, window_shards=3)[last] == walked[last]


def test_far_index_needs_no_history():
    """The billionth epoch is as near as the first."""
    order = SampleOrder(SIZES["uneven"], seed=5)
    assert sorted(epoch(order, 10**9)) == list(range(order.num_samples))


def test_window_mixes_its_shards_and_no_others():
    """Samples of one window come from `window_shards` shards, shuffled among each other."""
    order = SampleOrder([10] * 12, seed=1, window_shards=4)
    shards = [sample // 10 for sample in epoch(order, 0)]
    windows = [shards[start : start + 40] for start in range(0, 120, 40)]
    assert [len(set(window)) for window in windows] == [4, 4, 4]
    for window in windows:
        num_changes = sum(a != b for a, b in pairwise(window))
        assert num_changes > 15  # 3 if shards came one after the other, 30 expected if mixed


def test_shards_change_their_windows_between_epochs():
    """Which shards share a window is drawn anew every epoch."""
    order = SampleOrder([1] * 24, seed=1, window_shards=8)
    first_windows = {frozenset(epoch(order, epoch_index)[:8]) for epoch_index in range(5)}
    assert len(first_windows) == 5


def test_first_positions_are_uniform():
    """Over many epochs each sample opens the epoch equally often (chi-squared, 7 degrees)."""
    order = SampleOrder([2] * 4, seed=0, window_shards=2)
    counts = [0] * 8
    for epoch_index in range(1600):
        counts[order[epoch_index * 8]] += 1
    assert sum((count - 200) ** 2 / 200 for count in counts) < 24.3  # 99.9 % quantile


def test_order_is_frozen():
    """The order of a recorded run never changes: it is part of exact resume."""
    order = SampleOrder([3, 2, 4], seed=7, window_shards=2)
    assert epoch(order, 0) == [3, 8, 6, 4, 7, 5, 0, 2, 1]
    assert epoch(order, 1) == [8, 7, 6, 5, 4, 3, 2, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shard_sizes": [], "seed": 0}, "no samples to order in 0 shards"),
        ({"shard_sizes": [0, 0], "seed": 0}, "no samples to order in 2 shards"),
        ({"shard_sizes": [3, -1], "seed": 0}, "shard_sizes must be at least 0, got -1"),
        ({"shard_sizes": [3], "seed": -1}, "seed must be in"),
        ({"shard_sizes": [3], "seed": 2**64}, "seed must be in"),
        ({"shard_sizes": [3], "seed": 0, "window_shards": 0}, "window_shards must be at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    """Errors name the argument, the limit and what was given."""
    with pytest.raises(ValueError, match=message):
        SampleOrder(**arguments)


def test_negative_index_is_refused():
    """There is no sample before the first."""
    with pytest.raises(IndexError, match="at least 0, got -1"):
        SampleOrder([3], seed=0)[-1]


def test_order_of_a_billion_samples_is_cheap():
    """100,000 shards of 10,000 samples: made, and sought anywhere, in well under half a second."""
    started_s = time.perf_counter()
    order = SampleOrder(np.full(100_000, 10_000), seed=1)
    made_s = time.perf_counter()
    samples = {order[position] for position in (0, 123_456_789, 999_999_999, 10**15)}
    sought_s = time.perf_counter()
    assert len(samples) == 4
    assert made_s - started_s < 0.5
    assert (sought_s - made_s) / 4 < 0.5


@pytest.mark.parametrize("window_shards", [2, 8, 32])
def test_shuffling_of_sorted_data_is_as_the_docstring_says(window_shards):
    """One class a shard, the worst there is: run lengths and neighbours against a perfect shuffle.

    Of neighbours 1/w share their shard where a perfect shuffle has 1/64, a run of one class is
    w / (w - 1) long, a batch sees at most 2 w classes, and which sample follows which is otherwise
    as uncorrelated as in a perfect shuffle.
    """
    order = SampleOrder([200] * 64, seed=4, window_shards=window_shards)
    samples = np.array(epoch(order, 0))
    classes = samples // 200
    same = float(np.mean(classes[1:] == classes[:-1]))
    assert same == pytest.approx(1 / window_shards, rel=0.1)
    assert len(classes) / (1 + np.sum(classes[1:] != classes[:-1])) == pytest.approx(
        window_shards / (window_shards - 1), rel=0.05
    )
    batches = classes.reshape(-1, 128)
    assert max(len(set(batch)) for batch in batches.tolist()) <= 2 * window_shards
    within = samples % 200  # position inside the shard: must tell nothing about the next one's
    assert abs(np.corrcoef(within[1:], within[:-1])[0, 1]) < 0.03
    distance = 200 * window_shards
    assert abs(np.corrcoef(samples[distance:], samples[:-distance])[0, 1]) < 0.6


def test_shuffling_of_mixed_data_equals_a_perfect_shuffle():
    """Classes that were mixed when shards were cut: neighbours and batches as by pure chance."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 10, 64 * 200)
    shown = classes[epoch(SampleOrder([200] * 64, seed=4), 0)]
    assert np.mean(shown[1:] == shown[:-1]) == pytest.approx(0.1, abs=0.01)
    counts = np.stack([np.bincount(batch, minlength=10) for batch in shown.reshape(-1, 128)])
    assert counts.var(axis=0).mean() == pytest.approx(128 * 0.1 * 0.9, rel=0.15)
