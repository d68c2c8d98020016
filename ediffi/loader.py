"""Batches of joined samples for any training loop: exact, elastic, resumable anywhere.

The stream of samples is endless: global index g shows sample `order[g]`, epoch after epoch, see
`ediffi.sample_order`. A step takes the next `batch_samples` of it, each rank an equal part. So an
epoch shows every sample exactly once on any number of ranks, all ranks take equally many steps,
nothing is dropped or padded: the last batch of an epoch goes on into the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from ediffi.sample_order import SampleOrder
from ediffi.shards import JoinedShards, Sample
from ediffi.storage.parcel import PackedCollate, Parcel

Batch = TypeVar("Batch")

_STATE_VERSION = 1


class StateMismatch(ValueError):
    """A saved position belongs to another stream of samples."""


class JoinedLoader(Generic[Batch]):
    """This rank's batches. Iterating goes through the rest of the current epoch.

    `state_dict` counts what was yielded, not what workers prepared ahead, so a run that stops
    after any batch goes on with the next one. Seeking costs one window of the order, wherever it
    goes. `batch_samples`, ranks and workers may change between runs: the stream stays the same.

    Args:
        samples: the joined shards.
        collate: makes a batch of samples, in the worker, such as
            `ediffi.conditioning.collate` does for streams. Its tensors come over in one piece of
            shared memory, see `ediffi.storage.parcel`.
        seed: of the order.
        batch_samples: of all ranks together in one step, a multiple of `world_size`.
        rank: of this process, in [0, world_size).
        world_size: number of processes that share each batch.
        num_workers: processes that read ahead; 0 reads in this one.
        prefetch_batches: that each worker prepares ahead.
        window_shards: see `SampleOrder`.
        pin_memory: page-lock the batches for a GPU; they need a `pin_memory` method or be tensors.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        samples: JoinedShards,
        *,
        collate: Callable[[Sequence[Sample]], Batch],
        seed: int,
        batch_samples: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        prefetch_batches: int = 2,
        window_shards: int = 8,
        pin_memory: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size = {world_size}), got {rank}")
        if batch_samples < 1 or batch_samples % world_size:
            raise ValueError(
                f"batch_samples must be a multiple of world_size = {world_size}, so that all ranks "
                f"take equal steps, got {batch_samples}"
            )
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")
        if prefetch_batches < 1:
            raise ValueError(f"prefetch_batches must be at least 1, got {prefetch_batches}")
        self.order = SampleOrder(samples.shard_sizes, seed=seed, window_shards=window_shards)
        self.batch_samples = batch_samples
        self.rank = rank
        self.world_size = world_size
        self._ordered = _InOrder(samples, self.order)
        self._settings: dict[str, Any] = {
            "collate_fn": PackedCollate(collate) if num_workers else collate,
            "num_workers": num_workers,
            "prefetch_factor": prefetch_batches if num_workers else None,
            "pin_memory": pin_memory,
        }
        self._num_yielded = 0  # samples, over all ranks and epochs: the next global index
        self._batches: Iterator[Any] | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the next batch's first sample."""
        return self._num_yielded // self.order.num_samples

    def __len__(self) -> int:
        """Steps that iterating takes from here to the end of the current epoch."""
        epoch_end = (self.epoch + 1) * self.order.num_samples
        return -(-(epoch_end - self._num_yielded) // self.batch_samples)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches that begin in the current epoch; the next call goes on behind them.

        Raises:
            ShardError, OSError: see `JoinedShards`.
        """
        for _ in range(len(self)):
            if self._batches is None:
                self._batches = iter(self._load())
            try:
                batch = next(self._batches)
            except BaseException:
                self._batches = None  # it would go on behind the batch that was lost
                raise
            if isinstance(batch, Parcel):
                batch = batch.unpack()
            self._num_yielded += self.batch_samples
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position after the batches yielded so far, equal on all ranks."""
        return {"version": _STATE_VERSION, **self._stream(), "num_yielded": self._num_yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken, by any number of ranks.

        Raises:
            StateMismatch: the state is of other samples or of another order.
        """
        required = {"version": _STATE_VERSION, **self._stream()}
        for name, value in required.items():
            if state.get(name) != value:
                raise StateMismatch(
                    f"{name} of the saved position is {state.get(name)!r}, of this loader "
                    f"{value!r}: the batches would be others; give the loader the same samples, "
                    "seed and window_shards"
                )
        position = state.get("num_yielded")
        if not isinstance(position, int) or position < 0:
            raise StateMismatch(f"num_yielded must be a number of samples, got {position!r}")
        self._num_yielded = position
        self._batches = None  # with what its workers prepared

    def _stream(self) -> dict[str, int]:
        """What the stream of samples depends on."""
        return {
            "num_samples": self.order.num_samples,
            "seed": self.order.seed,
            "window_shards": self.order.window_shards,
        }

    def _load(self) -> DataLoader[Sample]:
        rank_samples = self.batch_samples // self.world_size
        start = self._num_yielded + self.rank * rank_samples
        return DataLoader(
            self._ordered,
            batch_sampler=_Steps(start, rank_samples, self.batch_samples),
            **self._settings,
        )


class _InOrder(Dataset[Sample]):
    """Samples by global index."""

    def __init__(self, samples: JoinedShards, order: SampleOrder) -> None:
        self.samples = samples
        self.order = order

    def __getitems__(self, global_indices: Sequence[int]) -> list[Sample]:
        return self.samples.__getitems__([self.order[index] for index in global_indices])


class _Steps:
    """Global indices of one rank's part of every step, without end."""

    def __init__(self, start: int, rank_samples: int, batch_samples: int) -> None:
        self.start = start
        self.rank_samples = rank_samples
        self.batch_samples = batch_samples

    def __iter__(self) -> Iterator[list[int]]:
        start = self.start
        while True:
            yield list(range(start, start + self.rank_samples))
            start += self.batch_samples
