"""The order of training samples: a pure function of (seed, global index).

An epoch visits every sample once: shards are shuffled, then the samples inside each window of a
few shards, so that reads stay local. The random numbers are raw Philox words addressed by (seed,
epoch, window), not a stream: any index is reached without what came before, and the order depends
neither on the number of workers nor on numpy's shuffling code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SHARDS, _SAMPLES = 0, 1  # what a permutation is for: separate regions of the Philox counter


class SampleOrder:
    """Map the global index of a training example to the sample it shows.

    Epoch e covers the global indices [e N, (e + 1) N) for N samples. Walking through a window
    computes its permutation once; jumping elsewhere costs one epoch plan and one window: some
    milliseconds for 100,000 shards of 10,000 samples.

    How good the shuffling is was judged against a perfect shuffle of the whole data set, on the
    worst data there is, sorted by class with one class a shard (`test_sample_order.py`). For
    windows of w shards, neighbours share their shard, and so their class, with probability 1/w
    instead of about 0: runs of one class are w / (w - 1) long instead of 1, and a batch holds at
    most 2 w classes. Neighbours' positions are otherwise uncorrelated beyond their window. Data
    that was mixed when its shards were cut, as crawled lists are, cannot tell the two apart. So
    mix sorted lists before ingesting them, or take more `window_shards`: they cost open files
    (`JoinedShards.max_open_shards`) and locality, nothing else.

    Args:
        shard_sizes: samples per shard, as `JoinedShards.shard_sizes`; zeros are allowed.
        seed: in [0, 2^64).
        window_shards: shards whose samples are mixed with each other.

    Raises:
        ValueError: an argument is out of range, or there is no sample at all.
    """

    def __init__(
        self, shard_sizes: Sequence[int] | NDArray[np.int64], *, seed: int, window_shards: int = 8
    ) -> None:
        sizes = np.array(shard_sizes, dtype=np.int64)
        if sizes.size and sizes.min() < 0:
            raise ValueError(f"shard_sizes must be at least 0, got {sizes.min()}")
        if sizes.sum() == 0:
            raise ValueError(f"no samples to order in {len(sizes)} shards")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2^64), got {seed}")
        if window_shards < 1:
            raise ValueError(f"window_shards must be at least 1, got {window_shards}")
        self.num_samples = int(sizes.sum())
        self.seed = seed
        self.window_shards = window_shards
        self._shard_sizes = sizes
        self._shard_starts = np.cumsum(sizes) - sizes
        self._epoch: _Epoch | None = None  # planned when first asked for, wherever that is
        self._window: _Window | None = None

    def __getitem__(self, global_index: int) -> int:
        """Return the sample index, in [0, num_samples)."""
        if global_index < 0:
            raise IndexError(f"global_index must be at least 0, got {global_index}")
        epoch_index, position = divmod(global_index, self.num_samples)
        window = self._window  # read once: another thread may replace it
        if window is None or not window.holds(epoch_index, position):
            window = self._window = self._find_window(epoch_index, position)
        return int(window.sample_indices[position - window.start])

    def _find_window(self, epoch_index: int, position: int) -> _Window:
        epoch = self._epoch
        if epoch is None or epoch.index != epoch_index:
            epoch = self._epoch = self._plan_epoch(epoch_index)
        return self._shuffle_window(
            epoch, int(np.searchsorted(epoch.window_ends, position, side="right"))
        )

    def _plan_epoch(self, epoch_index: int) -> _Epoch:
        shards = self._permutation(len(self._shard_sizes), epoch_index, _SHARDS, 0)
        starts = np.arange(0, len(shards), self.window_shards)
        window_sizes = np.add.reduceat(self._shard_sizes[shards], starts)
        return _Epoch(index=epoch_index, shards=shards, window_ends=np.cumsum(window_sizes))

    def _shuffle_window(self, epoch: _Epoch, window_index: int) -> _Window:
        first = window_index * self.window_shards
        shards = epoch.shards[first : first + self.window_shards]
        sizes = self._shard_sizes[shards]
        # Sample indices shard by shard: each shard's start, minus where it begins in the window.
        shifts = self._shard_starts[shards] - (np.cumsum(sizes) - sizes)
        samples = np.arange(sizes.sum()) + np.repeat(shifts, sizes)
        order = self._permutation(len(samples), epoch.index, _SAMPLES, window_index)
        return _Window(
            epoch_index=epoch.index,
            start=int(epoch.window_ends[window_index]) - len(samples),
            sample_indices=samples[order],
        )

    def _permutation(
        self, size: int, epoch_index: int, purpose: int, window_index: int
    ) -> NDArray[np.int64]:
        # The low words of the counter run through the draws; the high ones address the stream.
        philox = np.random.Philox(
            key=np.array([self.seed, epoch_index], dtype=np.uint64),
            counter=np.array([0, 0, purpose, window_index], dtype=np.uint64),
        )
        return np.argsort(philox.random_raw(size), kind="stable")


@dataclass(frozen=True, kw_only=True)
class _Epoch:
    """The shuffled shards of one epoch, cut into windows."""

    index: int
    shards: NDArray[np.int64]  # shard indices; a window is `window_shards` of them
    window_ends: NDArray[np.int64]  # position in the epoch after each window


@dataclass(frozen=True, kw_only=True)
class _Window:
    """The shuffled samples of one window."""

    epoch_index: int
    start: int  # position in the epoch
    sample_indices: NDArray[np.int64]

    def holds(self, epoch_index: int, position: int) -> bool:
        """Whether a position of an epoch lies in this window."""
        offset = position - self.start
        return self.epoch_index == epoch_index and 0 <= offset < len(self.sample_indices)
