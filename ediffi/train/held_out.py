"""Watching a training run on samples that it never sees: loss by noise level, drawn pictures.

The draws are those of `ediffi.loss`: equal for every run, and for the evaluation of finished
models, so that base, experts and ensemble are compared draw by draw. Nothing here touches what
training depends on: another network, other random numbers.

Shape legend: B batch, C channels, H W pixels, S strata of noise, N samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ediffi.conditioning import Conditioning, collate
from ediffi.loss import (
    HELD_OUT_LOSS,
    HELD_OUT_SEED,
    NUM_SIGMA_BINS,
    denoising_loss,
    paired_draws,
    sigma_bin_key,
    sigma_bins,
)
from ediffi.network import build_network
from ediffi.noise import WHOLE, NoiseInterval, SigmaDistribution
from ediffi.preconditioning import Denoiser
from ediffi.sampling import to_uint8
from ediffi.shards import JoinedShards
from ediffi.snapshot import load_snapshot, read_snapshot
from ediffi.train.data import centre_patch, low_res_of, to_unit_range
from ediffi.train.engine import Worker
from ediffi.train.grid import GridConfig, draw_pictures, routed, tile, write_png
from ediffi.train.job import TrainJob

__all__ = ["GridConfig", "Watch"]

_log = logging.getLogger(__name__)

_LARGEST_BATCH = 64  # images in one forward pass; a batch is never divided among ranks


@dataclass(frozen=True)
class _Stratum:
    """Where one draw of every sample falls; `number` makes its noise different from the others'."""

    number: int
    interval: NoiseInterval


class Watch:
    """Measures and draws with the averaged weights; every method is called by all ranks together.

    The averaged weights are loaded into a network of their own, made when first needed. Samples
    go to the ranks in whole batches, and the losses are put together sample by sample: the numbers
    do not depend on the number of ranks.

    Args:
        job: its `held_out` samples are watched; `start` is the parent of an expert.
        averages_whole: gives the averaged weights by parameter name, on every rank.
        worker: this process.

    Raises:
        ValueError: the job asks for measures or grids but lacks what they need.
    """

    def __init__(
        self, job: TrainJob, averages_whole: Callable[[], dict[str, Tensor]], worker: Worker
    ) -> None:
        _check(job)
        self._job = job
        self._averages_whole = averages_whole
        self._worker = worker
        self._images_loaded = -1  # images seen by the weights in `_own`
        self._interval = job.serves or job.interval
        self._batch_images = min(job.config.micro_batch_images, _LARGEST_BATCH)
        self._strata = _strata(self._interval, job.distribution)

    def measure(self, images_seen: int) -> dict[str, float]:
        """Loss of the averaged weights on held-out samples, in float32.

        Returns:
            "held_out_loss", the mean over p(sigma) inside the interval that the run serves, and
            "held_out_loss/sigma_bin_00" to "_07" for the bins that it touches. In a bin that it
            covers in part the parent answers the other draws, so that the figure is the parent's
            with the expert put in; without a parent such a bin is left out. With a parent, also
            "held_out_loss_parent": the parent on the draws of "held_out_loss".
        """
        interval = self._interval
        losses_SN = self._losses(self._averaged(images_seen), interval)
        inside_SN = interval.contains(self._sigma_SN)
        answered_SN = inside_SN
        row = {}
        if self._parent_path is not None:
            losses_SN = torch.where(inside_SN, losses_SN, self._parent_losses_SN)
            answered_SN = inside_SN | self._parent_interval.contains(self._sigma_SN)
            if _covers(self._parent_interval, interval):
                row["held_out_loss_parent"] = self._mean_inside(self._parent_losses_SN)
        for stratum, losses_N, answered_N in zip(self._strata, losses_SN, answered_SN):
            if stratum.number < NUM_SIGMA_BINS and answered_N.all():
                row[sigma_bin_key(HELD_OUT_LOSS, stratum.number)] = losses_N.mean().item()
        return {HELD_OUT_LOSS: self._mean_inside(losses_SN), **row}

    def draw(self, images_seen: int) -> None:
        """Draw the grid with the averaged weights, and write it to the job's `grid_path`.

        Below what is drawn stand the real pictures; for super-resolution, the input above it.
        Outside the interval that the run serves its parent draws.
        """
        job, config = self._job, self._job.grid
        assert config is not None
        assert job.grid_path is not None
        parent = None
        if self._interval != WHOLE:
            if self._parent_interval != WHOLE:
                _log.warning("no grid: the parent answers in %s alone", self._parent_interval)
                return
            parent = self._load_parent()
        denoiser = routed(self._averaged(images_seen), self._interval, parent)
        network = job.network
        shape_CHW = (network.image_channels, network.image_px, network.image_px)
        drawn_BCHW = torch.zeros(config.num_pictures, *shape_CHW, dtype=torch.uint8)
        for indices in self._batches(config.num_pictures):
            _, conditioning = self._read(indices)
            drawn_BCHW[indices.start : indices.stop] = draw_pictures(
                denoiser, config, indices, conditioning, shape_CHW, self._worker.device
            )
        drawn_BCHW = self._sum_over_ranks(drawn_BCHW)
        if self._worker.rank == 0:
            real_BCHW, conditioning = self._read(range(config.num_pictures))
            rows = [drawn_BCHW, to_uint8(real_BCHW)]
            if conditioning.low_res_BCHW is not None:
                rows.insert(0, to_uint8(conditioning.low_res_BCHW))
            write_png(job.grid_path / f"images-{images_seen:010d}.png", tile(rows))

    # -- losses -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _losses(self, denoiser: Denoiser, asked: NoiseInterval) -> Tensor:
        """Loss of every draw with sigma in `asked`, zero for others: (S, N) float64 on the CPU."""
        job, device = self._job, self._worker.device
        losses_SN = torch.zeros(len(self._strata), job.config.held_out_samples, dtype=torch.float64)
        for indices in self._batches(job.config.held_out_samples):
            images_BCHW, conditioning = self._read(indices)
            for losses_N, stratum in zip(losses_SN, self._strata):
                sigma_B, noise_BCHW = self._draws(stratum, indices, images_BCHW.shape[1:])
                asked_B = asked.contains(sigma_B).nonzero().flatten()
                if not len(asked_B):
                    continue
                rows = asked_B.to(device)
                loss_B = denoising_loss(
                    denoiser,
                    images_BCHW[rows],
                    sigma_B[asked_B].to(device),
                    noise_BCHW[asked_B].to(device),
                    conditioning.select(rows),
                    job.preconditioning,
                )
                losses_N[indices.start + asked_B] = loss_B.double().cpu()
        return self._sum_over_ranks(losses_SN)

    def _draws(
        self, stratum: _Stratum, indices: range, shape_CHW: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        return paired_draws(
            self._job.distribution,
            stratum.interval,
            shape_CHW,
            HELD_OUT_SEED,
            indices,
            stratum.number,
        )

    @cached_property
    def _sigma_SN(self) -> Tensor:
        """Noise level of every draw; they come before the noise, so none need be drawn."""
        indices = range(self._job.config.held_out_samples)
        return torch.stack([self._draws(stratum, indices, ())[0] for stratum in self._strata])

    @cached_property
    def _parent_losses_SN(self) -> Tensor:
        """The parent's, which never change; its weights are let go afterwards."""
        return self._losses(self._load_parent(), self._parent_interval)

    def _mean_inside(self, losses_SN: Tensor) -> float:
        """Mean over p(sigma) inside the interval.

        The bins serve if the interval consists of whole ones, else the stratum that is the
        interval itself: few draws of the bins may fall into a narrow one.
        """
        own = [index for index, one in enumerate(self._strata) if one.number == NUM_SIGMA_BINS]
        return losses_SN[own or slice(None)].mean().item()

    # -- networks ---------------------------------------------------------------------------------

    @cached_property
    def _own(self) -> Denoiser:
        """A denoiser for the averaged weights; made without drawing random ones."""
        with torch.device("meta"):
            network = build_network(self._job.network)
        network = network.to_empty(device=self._worker.device).requires_grad_(False)
        return Denoiser(network, self._job.preconditioning).eval()

    def _averaged(self, images_seen: int) -> Denoiser:
        if self._images_loaded != images_seen:
            self._own.network.load_state_dict(self._averages_whole())
            self._images_loaded = images_seen
        return self._own

    @property
    def _parent_path(self) -> Path | None:
        if self._job.base is not None:
            return self._job.base
        return None if self._job.start is None else self._job.start.snapshot

    @cached_property
    def _parent_interval(self) -> NoiseInterval:
        assert self._parent_path is not None
        return read_snapshot(self._parent_path)[0].interval

    def _load_parent(self) -> Denoiser:
        assert self._parent_path is not None
        return load_snapshot(self._parent_path)[1].to(self._worker.device)

    # -- samples ----------------------------------------------------------------------------------

    @cached_property
    def _samples(self) -> JoinedShards:
        job = self._job
        return JoinedShards(
            job.held_out, image_px=job.read_px, resize=job.resize, missing=job.missing
        )

    def _batches(self, num_samples: int) -> Iterator[range]:
        """Sample indices of the batches that are this rank's."""
        starts = range(0, num_samples, self._batch_images)
        for start in starts[self._worker.rank :: self._worker.world_size]:
            yield range(start, min(start + self._batch_images, num_samples))

    def _read(self, indices: range) -> tuple[Tensor, Conditioning]:
        """Pictures in [-1, 1] with their conditioning; fewer samples than asked come again."""
        job, device = self._job, self._worker.device
        places = [index % len(self._samples) for index in indices]
        samples = self._samples.__getitems__(places)
        images = [centre_patch(sample.image, job.network.image_px) for sample in samples]
        conditioning = collate([sample.streams for sample in samples], job.network.streams)
        if job.low_res is not None:
            low_res = [
                low_res_of(image, job.low_res, place) for image, place in zip(images, places)
            ]
            conditioning = replace(conditioning, low_res_BCHW=torch.stack(low_res))
        images_BCHW = torch.stack([to_unit_range(image) for image in images])
        return images_BCHW.to(device), conditioning.to(device, torch.float32)

    def _sum_over_ranks(self, part: Tensor) -> Tensor:
        """Put together what each rank filled into a tensor of zeros; the result is exact."""
        whole = part.to(self._worker.device)
        dist.all_reduce(whole)
        return whole.cpu()


def _check(job: TrainJob) -> None:
    """Raise ValueError unless the job has what its watching needs."""
    config = job.config
    watches = [name for name in ("held_out_images", "grid_images") if getattr(config, name)]
    if watches and not job.held_out:
        raise ValueError(
            f"train.{watches[0]} needs held-out samples, got none: hold some out of the data, or "
            f"set {watches[0]} to 0"
        )
    if not config.grid_images:
        return
    for field in ("grid", "grid_path"):
        if getattr(job, field) is None:
            raise ValueError(f"train.grid_images needs the job's {field}, got none: give it")
    served = job.serves or job.interval
    if served != WHOLE and job.start is None:
        raise ValueError(
            f"train.grid_images must be 0 for a run on {served} without a parent: alone it cannot "
            f"go from noise to a picture, got {config.grid_images}"
        )


def _strata(interval: NoiseInterval, distribution: SigmaDistribution) -> tuple[_Stratum, ...]:
    """The bins that an interval touches; where it cuts one, the interval itself as well."""
    bins = [
        _Stratum(number, one)
        for number, one in enumerate(sigma_bins(NUM_SIGMA_BINS, distribution))
        if one.sigma_min < interval.sigma_max and interval.sigma_min < one.sigma_max
    ]
    touched = NoiseInterval(bins[0].interval.sigma_min, bins[-1].interval.sigma_max)
    if _covers(interval, touched):
        return tuple(bins)
    return (*bins, _Stratum(NUM_SIGMA_BINS, interval))


def _covers(outer: NoiseInterval, inner: NoiseInterval) -> bool:
    return outer.sigma_min <= inner.sigma_min and inner.sigma_max <= outer.sigma_max
