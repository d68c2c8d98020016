"""The training loop, one for the base model and the experts (eDiff-I sections 3 and 4).

An expert is a run whose noise interval is not the whole axis and whose start is its parent's
snapshot. To resume, call `train` again with the same job: it continues from the newest sound
checkpoint exactly where an undisturbed run would have been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ediffi.loss import denoising_loss
from ediffi.noise import WHOLE, NoiseInterval, SigmaDistribution
from ediffi.preconditioning import Denoiser, Preconditioning
from ediffi.shards import JoinedShards, Missing, Resize, SampleOrder, ShardRef
from ediffi.snapshot import Snapshot, load_snapshot, save_snapshot
from ediffi.train.checkpoint import CheckpointStore, Progress
from ediffi.train.config import TrainConfig
from ediffi.train.data import Batch, TrainingExamples, load_batches
from ediffi.train.ema import EMA, ema_decay
from ediffi.train.engine import Worker, join_process_group, make_engine, set_lr, take_step
from ediffi.unet import UNet, UNetConfig

_NUM_SIGMA_BINS = 8

Report = Callable[[dict[str, float]], None]


class TrainingDiverged(ArithmeticError):
    """Loss or gradient are no longer finite; the last checkpoint is from before."""


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Everything that one training run depends on."""

    network: UNetConfig
    preconditioning: Preconditioning
    distribution: SigmaDistribution
    interval: NoiseInterval = WHOLE
    config: TrainConfig
    shards: tuple[ShardRef, ...]
    resize: Resize = "center_crop"
    missing: Missing = "error"  # what to do with a picture that lacks an embedding
    initial: Path | None = None  # parent's snapshot to start from; None: random weights
    checkpoint_path: Path  # resumable state, on storage that all ranks share
    snapshot_path: Path  # the result: EMA weights


def train(job: TrainJob, report: Report) -> dict[str, float]:
    """Train to `job.config.final_images`; called by every rank.

    Args:
        job: what to train.
        report: given a row with "images", "loss", "lr", "grad_norm", "images_per_s",
            "data_wait_fraction" and "loss/sigma_bin_00" to "_07" (octiles of the distribution that
            the interval touches), every `log_images` and at every checkpoint. It is called on
            every rank: losses are means over all ranks since the last row, times the rank's own.
            After a resume the rows since the checkpoint come once more, with the same losses.

    Returns:
        {"images_seen", "resumed_from_images", "final_loss", "num_parameters"}.

    Raises:
        TrainingDiverged: loss or gradient became infinite or nan.
        ValueError: parent, checkpoint or number of ranks do not fit the job.
    """
    worker = join_process_group()
    denoiser, num_parameters = build_denoiser(job)
    engine = make_engine(denoiser, job.config, worker)
    try:
        ema = EMA(denoiser.network)
        store = CheckpointStore(
            job.checkpoint_path, keep=job.config.keep_checkpoints, worker=worker
        )
        start = store.load_newest(engine, ema)
        end = _train_on(job, engine, ema, store, start, report)
        _save_snapshot(job, ema, worker, end.images_seen)
    finally:
        engine.destroy()
    return {
        "images_seen": end.images_seen,
        "resumed_from_images": start.images_seen,
        "final_loss": end.loss,
        "num_parameters": num_parameters,
    }


def build_denoiser(job: TrainJob) -> tuple[Denoiser, int]:
    """Make the denoiser to train, and count its parameters.

    The weights are random, as a function of the seed alone, or those of the parent's snapshot.

    Raises:
        ValueError: the parent has another architecture or preconditioning.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(job.config.seed)
        network = UNet(job.network)
    if job.initial is not None:
        parent, parent_denoiser = load_snapshot(job.initial)
        _check_parent(job, parent)
        network.load_state_dict(parent_denoiser.network.state_dict())
    return Denoiser(network, job.preconditioning), network.num_parameters


def _check_parent(job: TrainJob, parent: Snapshot) -> None:
    required = _architecture(job.network) | job.preconditioning.to_json()
    found = _architecture(parent.network) | parent.preconditioning.to_json()
    differing = [
        f"{field} must be {found[field]!r} as in the parent, got {required[field]!r}"
        for field in required
        if required[field] != found[field]
    ]
    if differing:
        raise ValueError(
            f"the network cannot start from snapshot {job.initial}: {'; '.join(differing)}. "
            "Use the parent's network settings, or train another parent"
        )


def _architecture(network: UNetConfig) -> dict[str, Any]:
    """Everything that shapes the weights; how often streams are dropped does not."""
    streams = tuple(replace(stream, dropout=0.0) for stream in network.streams)
    return replace(network, streams=streams).to_json()


def _train_on(
    job: TrainJob, engine: Any, ema: EMA, store: CheckpointStore, start: Progress, report: Report
) -> Progress:
    """Train from `start` to the end; return how far it came."""
    config, progress = job.config, start
    samples = JoinedShards(
        job.shards, image_px=job.network.image_px, resize=job.resize, missing=job.missing
    )
    with closing(samples):
        batches = _batches(job, samples, store.worker, start.images_seen)
        meter = Meter(store.worker)
        for images in range(start.images_seen, config.final_images, config.batch_images):
            seen = images + config.batch_images
            lr = config.lr_at(images + config.batch_images / 2)
            set_lr(engine, lr)
            grad_norm = _train_batch(job, engine, batches, meter)
            _check_finite(job, seen, "gradient norm", grad_norm)
            ema.update(ema_decay(config, seen))
            saves = _is_due(config, seen, config.checkpoint_images)
            if saves or _is_due(config, seen, config.log_images):
                # A checkpoint ends the stretch: resumed and undisturbed runs report alike.
                row = {"images": seen, "lr": lr, "grad_norm": grad_norm, **meter.read()}
                _check_finite(job, seen, "loss", row["loss"])
                progress = Progress(images_seen=seen, loss=row["loss"])
                report(row)
            if saves:
                store.save(engine, ema, progress)
                meter.restart_clock()
    return progress


def _batches(
    job: TrainJob, samples: JoinedShards, worker: Worker, start_images: int
) -> Iterator[Batch]:
    examples = TrainingExamples(
        samples,
        SampleOrder(samples.shard_sizes, seed=job.config.seed),
        streams=job.network.streams,
        seed=job.config.seed,
        flip=job.config.flip,
    )
    return iter(load_batches(examples, job.config, worker, start_images))


def _train_batch(job: TrainJob, engine: Any, batches: Iterator[Batch], meter: Meter) -> float:
    """Take one optimizer step over all micro-batches; return the gradient norm."""
    grad_norm = math.nan
    for _ in range(engine.gradient_accumulation_steps()):
        with meter.waiting():
            batch = next(batches).to(engine.device)
        sigma_B = job.distribution.sigma_at(batch.u_B, job.interval)
        loss_B = denoising_loss(
            engine,
            batch.images_BCHW,
            sigma_B,
            batch.noise_BCHW,
            batch.conditioning,
            job.preconditioning,
        )
        engine.backward(loss_B.mean())
        grad_norm = take_step(engine, job.config.grad_clip)
        low = job.distribution.cdf(job.interval.sigma_min)
        meter.add(loss_B.detach(), low + batch.u_B * job.interval.mass(job.distribution))
    return grad_norm


def _check_finite(job: TrainJob, images_seen: int, name: str, value: float) -> None:
    if not math.isfinite(value):
        raise TrainingDiverged(
            f"{name} is {value} at {images_seen} images: lower train.lr or raise "
            f"train.warmup_images and start anew. The last checkpoint in {job.checkpoint_path} "
            "is from before"
        )


def _is_due(config: TrainConfig, images_seen: int, every_images: int) -> bool:
    """Whether the batch that ends at `images_seen` crossed a multiple, or is the last."""
    before = images_seen - config.batch_images
    crossed = images_seen // every_images > before // every_images
    return crossed or images_seen >= config.final_images


def _save_snapshot(job: TrainJob, ema: EMA, worker: Worker, images_seen: int) -> None:
    average = ema.gather()
    if worker.rank == 0:
        snapshot = Snapshot(
            network=job.network,
            preconditioning=job.preconditioning,
            distribution=job.distribution,
            interval=job.interval,
            images_seen=images_seen,
        )
        save_snapshot(job.snapshot_path, snapshot, average)
    dist.barrier()


class Meter:
    """Loss and speed since the last reading."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        # Row 0 sums losses, row 1 counts images, per octile of the sigma distribution. On the
        # device: reading a value at every step would stop a GPU.
        self._bins = torch.zeros(2, _NUM_SIGMA_BINS, dtype=torch.float64, device=worker.device)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out the time that passed since the last reading."""
        self._waited_s = 0.0
        self._started_s = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        started_s = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - started_s

    def add(self, loss_B: Tensor, quantile_B: Tensor) -> None:
        """Note the losses of some images and where in the distribution their sigma lies."""
        bin_B = (quantile_B * _NUM_SIGMA_BINS).long().clamp_(max=_NUM_SIGMA_BINS - 1)
        losses_2B = torch.stack([loss_B.double(), torch.ones_like(loss_B, dtype=torch.float64)])
        self._bins.index_add_(1, bin_B, losses_2B)

    def read(self) -> dict[str, float]:
        """Means over all ranks since the last reading; called by all ranks together."""
        dist.all_reduce(self._bins)
        elapsed_s = time.perf_counter() - self._started_s
        sums, counts = self._bins.tolist()
        row = {
            "loss": sum(sums) / sum(counts),
            "images_per_s": sum(counts) / elapsed_s,
            "data_wait_fraction": self._waited_s / elapsed_s,
        }
        for index, (loss, count) in enumerate(zip(sums, counts)):
            if count:
                row[f"loss/sigma_bin_{index:02d}"] = loss / count
        self._bins.zero_()
        self.restart_clock()
        return row
