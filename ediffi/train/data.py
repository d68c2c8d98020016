"""Training examples as pure functions of (seed, global sample index).

Which sample comes i-th, its noise level, noise, mirroring and dropped streams depend on nothing but
the seed and i, the number of images seen before it; so do the patch that super-resolution training
cuts and the degradation of its low-resolution input. A run therefore resumes at any image, on any
number of ranks and data workers, with exactly the examples that an undisturbed run would have seen.

Shape legend: B batch, C channels, H W pixels, h w pixels at low resolution.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ediffi.conditioning import Conditioning, StreamConfig, collate
from ediffi.degradation import LowRes, degrade
from ediffi.shards import Sample
from ediffi.train.config import TrainConfig
from ediffi.train.engine import Worker

# Regions of the Philox counter; `sample_order` has 0 and 1 under the same keys.
_EXAMPLES, _PATCHES, _DEGRADATIONS, _HELD_OUT_DEGRADATIONS = 2, 3, 4, 5


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
    generator = _generator(seed, global_index, _EXAMPLES)
    return Draws(
        u=generator.random(),
        flip=generator.random() < 0.5,
        noise_CHW=generator.standard_normal(tuple(shape_CHW), dtype=np.float32),
        keep=generator.random(num_streams),
    )


def _generator(seed: int, index: int, region: int) -> np.random.Generator:
    key = np.array([seed, index], dtype=np.uint64)
    counter = np.array([0, 0, region, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def random_patch(image_CHW: Tensor, patch_px: int, *, seed: int, global_index: int) -> Tensor:
    """Cut the square that one example is trained on, uniform over all places.

    Raises:
        ValueError: the picture is smaller than the patch.
    """
    tops, lefts = _num_places(image_CHW, patch_px)
    generator = _generator(seed, global_index, _PATCHES)
    top, left = int(generator.integers(tops)), int(generator.integers(lefts))
    return image_CHW[:, top : top + patch_px, left : left + patch_px]


def centre_patch(image_CHW: Tensor, patch_px: int) -> Tensor:
    """Cut the square that stands for a held-out picture: the one in the middle.

    Raises:
        ValueError: the picture is smaller than the patch.
    """
    tops, lefts = _num_places(image_CHW, patch_px)
    top, left = (tops - 1) // 2, (lefts - 1) // 2
    return image_CHW[:, top : top + patch_px, left : left + patch_px]


def _num_places(image_CHW: Tensor, patch_px: int) -> tuple[int, int]:
    height_px, width_px = image_CHW.shape[1:]
    if min(height_px, width_px) < patch_px:
        raise ValueError(
            f"a patch of {patch_px} px must fit the picture, got {height_px} x {width_px} px: "
            "read pictures at a larger size, or train on smaller patches"
        )
    return height_px - patch_px + 1, width_px - patch_px + 1


def low_res_of(image_CHW: Tensor, low_res: LowRes, sample_index: int, *, seed: int = 0) -> Tensor:
    """Degrade a held-out picture, or its centre patch, always in the same way.

    Args:
        image_CHW: uint8, as samples hold it.
        low_res: how.
        sample_index: of the held-out sample.
        seed: of all degradations.

    Returns:
        float32 (3, h, w) in [-1, 1].
    """
    return _degraded(image_CHW, low_res, _generator(seed, sample_index, _HELD_OUT_DEGRADATIONS))


def _degraded(image_CHW: Tensor, low_res: LowRes, generator: np.random.Generator) -> Tensor:
    picture_CHW = image_CHW.numpy().astype(np.float32) / np.float32(255)
    return torch.from_numpy(degrade(picture_CHW, low_res, generator)).mul_(2).sub_(1)


def to_unit_range(image_CHW: Tensor) -> Tensor:
    """Pictures of bytes as float32 in [-1, 1]."""
    return image_CHW.float().div_(127.5).sub_(1)


@dataclass(frozen=True, slots=True)
class Example:
    """One picture with everything that the loss needs to know about it."""

    image_CHW: Tensor  # float32 in [-1, 1]
    u: float
    noise_CHW: Tensor
    keep: Mapping[str, bool]  # per stream: not dropped
    streams: Mapping[str, Mapping[str, Tensor]]
    low_res_CHW: Tensor | None = None  # float32 in [-1, 1], of the same patch and way round


class TrainingExamples(Dataset[Example]):
    """Endless map from global sample index to example.

    Args:
        samples: the pictures and cached embeddings.
        order: which of them comes i-th.
        streams: the network's, in its order, with their dropout.
        seed: of all draws.
        flip: mirror half of the pictures.
        patch_px: side of the square that is cut at random from each picture; 0: all of it.
        low_res: how the low-resolution input of super-resolution is made; None: there is none.
    """

    def __init__(
        self,
        samples: Samples,
        order: Order,
        *,
        streams: Sequence[StreamConfig],
        seed: int,
        flip: bool,
        patch_px: int = 0,
        low_res: LowRes | None = None,
    ) -> None:
        self.samples = samples
        self.order = order
        self.streams = tuple(streams)
        self.seed = seed
        self.flip = flip
        self.patch_px = patch_px
        self.low_res = low_res

    def __getitem__(self, global_index: int) -> Example:
        """Make the example that is shown after `global_index` images."""
        return self._example(global_index, self.samples[self.order[global_index]])

    def __getitems__(self, global_indices: Sequence[int]) -> list[Example]:
        """Make the examples of a batch; their samples are read together."""
        samples = self.samples.__getitems__([self.order[index] for index in global_indices])
        return [self._example(index, sample) for index, sample in zip(global_indices, samples)]

    def _example(self, global_index: int, sample: Sample) -> Example:
        image_CHW = sample.image
        if self.patch_px:
            image_CHW = random_patch(
                image_CHW, self.patch_px, seed=self.seed, global_index=global_index
            )
        draws = draw(self.seed, global_index, image_CHW.shape, len(self.streams))
        if self.flip and draws.flip:
            image_CHW = image_CHW.flip(-1)
        return Example(
            image_CHW=to_unit_range(image_CHW),
            u=draws.u,
            noise_CHW=torch.from_numpy(draws.noise_CHW),
            keep={s.name: draws.keep[i] >= s.dropout for i, s in enumerate(self.streams)},
            streams=sample.streams,
            low_res_CHW=self._low_res(image_CHW, global_index),
        )

    def _low_res(self, image_CHW: Tensor, global_index: int) -> Tensor | None:
        if self.low_res is None:
            return None
        generator = _generator(self.seed, global_index, _DEGRADATIONS)
        return _degraded(image_CHW, self.low_res, generator)


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
    conditioning = collate([example.streams for example in examples], streams).drop(keep)
    low_res = [e.low_res_CHW for e in examples if e.low_res_CHW is not None]
    if low_res:
        conditioning = replace(conditioning, low_res_BCHW=torch.stack(low_res))
    return Batch(
        images_BCHW=torch.stack([example.image_CHW for example in examples]),
        u_B=torch.tensor([example.u for example in examples], dtype=torch.float64),
        noise_BCHW=torch.stack([example.noise_CHW for example in examples]),
        conditioning=conditioning,
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
