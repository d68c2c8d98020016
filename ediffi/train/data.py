"""Training examples as pure functions of (seed, global sample index).

Which sample comes i-th, its noise level, noise, mirroring and dropped streams depend on nothing but
the seed and i, the number of images seen before it. A run therefore resumes at any image, on any
number of ranks and data workers, with exactly the examples that an undisturbed run would have seen.

Shape legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ediffi.conditioning import Conditioning, StreamConfig, collate
from ediffi.shards import Sample
from ediffi.train.config import TrainConfig
from ediffi.train.engine import Worker

_EXAMPLES = 2  # region of the Philox counter; `sample_order` has 0 and 1 under the same keys


class Order(Protocol):
    """Which sample comes i-th; see `ediffi.shards.SampleOrder`."""

    def __getitem__(self, global_index: int) -> int:
        """Index of the sample to show after `global_index` images."""


class Samples(Protocol):
    """A map-style data set; see `ediffi.shards.JoinedShards`."""

    def __getitem__(self, sample_index: int) -> Sample:
        """Read one sample."""

    def __getitems__(self, sample_indices: Sequence[int]) -> list[Sample]:
        """Read the samples of a batch together."""


@dataclass(frozen=True, slots=True)
class Draws:
    """All the randomness of one example."""

    u: float  # fraction of the noise interval's probability below the noise level, in [0, 1)
    flip: bool
    noise_CHW: NDArray[np.float32]  # standard normal
    keep: NDArray[np.float64]  # per stream, uniform in [0, 1): kept if not below its dropout


def draw(seed: int, global_index: int, shape_CHW: Sequence[int], num_streams: int) -> Draws:
    """Draw one example's randomness from its own Philox stream, keyed by (seed, global_index).

    Streams come last: adding one changes nothing else, so such runs stay comparable.
    """
    key = np.array([seed, global_index], dtype=np.uint64)
    philox = np.random.Philox(key=key, counter=np.array([0, 0, _EXAMPLES, 0], dtype=np.uint64))
    generator = np.random.Generator(philox)
    return Draws(
        u=generator.random(),
        flip=generator.random() < 0.5,
        noise_CHW=generator.standard_normal(tuple(shape_CHW), dtype=np.float32),
        keep=generator.random(num_streams),
    )


@dataclass(frozen=True, slots=True)
class Example:
    """One picture with everything that the loss needs to know about it."""

    image_CHW: Tensor  # float32 in [-1, 1]
    u: float
    noise_CHW: Tensor
    keep: Mapping[str, bool]  # per stream: not dropped
    streams: Mapping[str, Mapping[str, Tensor]]


class TrainingExamples(Dataset[Example]):
    """Endless map from global sample index to example.

    Args:
        samples: the pictures and cached embeddings.
        order: which of them comes i-th.
        streams: the network's, in its order, with their dropout.
        seed: of all draws.
        flip: mirror half of the pictures.
    """

    def __init__(
        self,
        samples: Samples,
        order: Order,
        *,
        streams: Sequence[StreamConfig],
        seed: int,
        flip: bool,
    ) -> None:
        self.samples = samples
        self.order = order
        self.streams = tuple(streams)
        self.seed = seed
        self.flip = flip

    def __getitem__(self, global_index: int) -> Example:
        """Make the example that is shown after `global_index` images."""
        return self._example(global_index, self.samples[self.order[global_index]])

    def __getitems__(self, global_indices: Sequence[int]) -> list[Example]:
        """Make the examples of a batch; their samples are read together."""
        samples = self.samples.__getitems__([self.order[index] for index in global_indices])
        return [self._example(index, sample) for index, sample in zip(global_indices, samples)]

    def _example(self, global_index: int, sample: Sample) -> Example:
        draws = draw(self.seed, global_index, sample.image.shape, len(self.streams))
        image_CHW = sample.image.float().div_(127.5).sub_(1)
        return Example(
            image_CHW=image_CHW.flip(-1) if self.flip and draws.flip else image_CHW,
            u=draws.u,
            noise_CHW=torch.from_numpy(draws.noise_CHW),
            keep={s.name: draws.keep[i] >= s.dropout for i, s in enumerate(self.streams)},
            streams=sample.streams,
        )


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    images_BCHW: Tensor  # float32 in [-1, 1]
    u_B: Tensor  # float64 in [0, 1)
    noise_BCHW: Tensor
    conditioning: Conditioning  # dropped streams are dropped already

    def to(self, device: torch.device) -> Batch:
        """Move to `device`, embeddings as float32; overlaps with computing if pinned."""
        return Batch(
            self.images_BCHW.to(device, non_blocking=True),
            self.u_B.to(device, non_blocking=True),
            self.noise_BCHW.to(device, non_blocking=True),
            self.conditioning.to(device, torch.float32),
        )

    def pin_memory(self) -> Batch:
        """Page-lock the pictures and noise; DataLoader calls it."""
        return Batch(
            self.images_BCHW.pin_memory(),
            self.u_B.pin_memory(),
            self.noise_BCHW.pin_memory(),
            self.conditioning,
        )


def collate_examples(examples: Sequence[Example], streams: Sequence[StreamConfig]) -> Batch:
    """Stack examples and drop their streams."""
    keep = {s.name: torch.tensor([bool(e.keep[s.name]) for e in examples]) for s in streams}
    return Batch(
        images_BCHW=torch.stack([example.image_CHW for example in examples]),
        u_B=torch.tensor([example.u for example in examples], dtype=torch.float64),
        noise_BCHW=torch.stack([example.noise_CHW for example in examples]),
        conditioning=collate([example.streams for example in examples], streams).drop(keep),
    )


class RankBatches(Sampler[list[int]]):
    """Global sample indices of one rank's micro-batches, in order.

    Every batch is `batch_images` consecutive indices; each rank has a contiguous equal part of it.
    """

    def __init__(self, config: TrainConfig, *, start_images: int, rank: int, world_size: int):
        self.batch_starts = range(start_images, config.final_images, config.batch_images)
        self.rank_images = config.batch_images // world_size
        self.micro_images = config.micro_batch(world_size)
        self.rank = rank

    def __len__(self) -> int:
        return len(self.batch_starts) * (self.rank_images // self.micro_images)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of one micro-batch after the other."""
        for batch_start in self.batch_starts:
            start = batch_start + self.rank * self.rank_images
            for micro_start in range(start, start + self.rank_images, self.micro_images):
                yield list(range(micro_start, micro_start + self.micro_images))


def load_batches(
    examples: TrainingExamples, config: TrainConfig, worker: Worker, start_images: int
) -> DataLoader[Example]:
    """Micro-batches of this rank from `start_images` on, prepared by `config.data_workers`."""
    batches = RankBatches(
        config, start_images=start_images, rank=worker.rank, world_size=worker.world_size
    )
    return DataLoader(
        examples,
        batch_sampler=batches,
        collate_fn=partial(collate_examples, streams=examples.streams),
        num_workers=config.data_workers,
        pin_memory=worker.device.type == "cuda",
        generator=torch.Generator(),  # else making the iterator would advance the global one
    )
