"""The training loop, one for base, experts and super-resolution (eDiff-I sections 3 and 4).

An expert is a run whose noise interval is not the whole axis and whose start is its parent's
snapshot; a super-resolution model has another network and a low-resolution input. To resume, call
`train` again with the same job: it continues from the newest sound checkpoint exactly where an
undisturbed run would have been, on any number of ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ediffi.loss import denoising_loss
from ediffi.shards import JoinedShards, SampleOrder
from ediffi.snapshot import Snapshot, save_snapshot
from ediffi.train.checkpoint import CheckpointStore, Progress
from ediffi.train.config import TrainConfig
from ediffi.train.data import Batch, TrainingExamples, load_batches
from ediffi.train.ema import Averages
from ediffi.train.engine import Step, Worker, join_process_group, make_engine, set_lr, take_step
from ediffi.train.flops import count_flops, peak_flops
from ediffi.train.guard import SpikeGuard, TrainingDiverged
from ediffi.train.held_out import Watch
from ediffi.train.job import TrainJob
from ediffi.train.meter import Meter
from ediffi.train.power_snapshots import PowerSnapshots
from ediffi.train.start import build_denoiser, carry_over, images_before
from ediffi.train.state import ShardedState
from ediffi.train.stop import Stopped, StopRequest, never

__all__ = ["Stopped", "TrainJob", "TrainingDiverged", "train"]

_log = logging.getLogger(__name__)

Report = Callable[[dict[str, float]], None]


def train(
    job: TrainJob, report: Report, should_stop: Callable[[], bool] = never
) -> dict[str, float]:
    """Train to `job.config.final_images`; called by every rank.

    Args:
        job: what to train.
        report: given a row on every rank, every `log_images`: "images", "lr", "grad_norm",
            "num_spikes" and what `Meter.read` and `Watch.measure` say. Losses are means over all
            ranks since the last row; times are the rank's own. After a resume the rows since the
            checkpoint come once more, with the same losses.
        should_stop: asked after every batch on every rank; one yes is enough.

    Returns:
        {"images_seen", "resumed_from_images", "final_loss", "num_parameters", "num_spikes"}.

    Raises:
        Stopped: it was asked to end, and has saved a checkpoint.
        TrainingDiverged: a gradient was not finite, or a spike, and the policy is to stop.
        ValueError: parent, checkpoint or number of ranks do not fit the job.
    """
    worker = join_process_group()
    denoiser, num_parameters = build_denoiser(job)
    guard = SpikeGuard(job.config)
    engine = make_engine(denoiser, job.config, worker, guard)
    with ExitStack() as stack:
        stack.callback(engine.destroy)
        stop = stack.enter_context(StopRequest(should_stop, worker))
        run = _Run(job, engine, denoiser.network, worker, guard)
        stack.callback(run.store.close)
        start = run.begin()
        end = run.train_on(start, report, stop)
        run.save_snapshot(end)
    return {
        "images_seen": end.images_seen,
        "resumed_from_images": start.images_seen,
        "final_loss": end.loss,
        "num_parameters": num_parameters,
        "num_spikes": end.num_spikes,
    }


class _Run:
    """The parts of one training run, and the loop over its batches."""

    def __init__(
        self, job: TrainJob, engine: Any, network: Any, worker: Worker, guard: SpikeGuard
    ) -> None:
        config = job.config
        self.job, self.config, self.engine, self.worker = job, config, engine, worker
        self.guard = guard
        self.state = ShardedState(engine, network, worker)
        age_images = images_before(job)
        self.averages = Averages(config, self.state.fragments, images_before=age_images)
        self.stored = PowerSnapshots(
            job.checkpoint_path.with_name("power_ema"), config, worker, images_before=age_images
        )
        self.store = CheckpointStore(
            job.checkpoint_path,
            keep=config.keep_checkpoints,
            keep_every_images=config.keep_every_images,
            worker=worker,
        )
        self.flops = count_flops(job.network)
        peak = peak_flops(worker.device, config.precision)
        _log.info("mfu counts from %s", peak)
        self.meter = Meter(worker, peak)
        self.watch = Watch(job, lambda: self.whole(self.averages.kinds[0]), worker)

    # -- the loop ---------------------------------------------------------------------------------

    def train_on(self, progress: Progress, report: Report, stop: StopRequest) -> Progress:
        """Train from `progress` to the end; return how far it came."""
        job, config = self.job, self.config
        samples = JoinedShards(
            job.shards, image_px=job.read_px, resize=job.resize, missing=job.missing
        )
        with closing(samples):
            batches = self._batches(samples, progress.images_seen)
            self.meter.restart_clock()
            for images in range(progress.images_seen, config.final_images, config.batch_images):
                seen = images + config.batch_images
                lr = config.lr_at(images + config.batch_images / 2) * progress.lr_factor
                set_lr(self.engine, lr)
                step = self._train_batch(batches)
                progress = self._judge(step, replace(progress, images_seen=seen))
                self.averages.update(seen)
                row = {}
                if _is_due(config, seen, config.log_images):
                    row = {"lr": lr, "num_spikes": progress.num_spikes, **self.meter.read()}
                    row |= {"grad_norm": step.grad_norm} if step.taken else {}
                    progress = replace(progress, loss=row.get("loss", progress.loss))
                with self.meter.paused():
                    row |= self._watch(seen)
                    if row:
                        report({"images": seen, **row})
                    asked = stop.is_agreed()
                    self._keep(progress, asked)
                if asked and seen < config.final_images:
                    raise Stopped(seen)
        return progress

    def _batches(self, samples: JoinedShards, start_images: int) -> Iterator[Batch]:
        job, network = self.job, self.job.network
        examples = TrainingExamples(
            samples,
            SampleOrder(samples.shard_sizes, seed=job.config.seed),
            streams=network.streams,
            seed=job.config.seed,
            flip=job.config.flip,
            patch_px=network.image_px if job.read_px > network.image_px else 0,
            low_res=job.low_res,
        )
        return iter(load_batches(examples, job.config, self.worker, start_images))

    def _train_batch(self, batches: Iterator[Batch]) -> Step:
        """Take one optimizer step over all micro-batches."""
        step = None
        while step is None:
            with self.meter.waiting():
                batch = next(batches).to(self.engine.device)
            loss_B, quantile_B = self._losses(batch)
            self.engine.backward(loss_B.mean())
            step = take_step(self.engine, self.config)
            self.meter.add(loss_B.detach(), quantile_B)
            self.meter.count_flops(self.flops.batch(batch.conditioning))
        self.meter.count_step()
        return step

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of each picture, and the quantile of p(sigma) at which its noise level lies."""
        job = self.job
        loss_B = denoising_loss(
            self.engine,
            batch.images_BCHW,
            job.distribution.sigma_at(batch.u_B, job.interval),
            batch.noise_BCHW,
            batch.conditioning,
            job.preconditioning,
        )
        low = job.distribution.cdf(job.interval.sigma_min)
        return loss_B, low + batch.u_B * job.interval.mass(job.distribution)

    def _judge(self, step: Step, progress: Progress) -> Progress:
        """Act as the job's policy says on a step that the guard refused."""
        if not step.taken:
            progress = replace(progress, num_spikes=progress.num_spikes + 1)
            reaction = self.guard.react(progress)
            if self.worker.rank == 0:
                _log.warning("%s", reaction.message)
            # Weights go back, the position does not: the batches since are what upset them.
            if reaction.rolls_back and self._restore() is None and self.worker.rank == 0:
                _log.warning("there is no checkpoint yet: weights stay as they are")
            progress = replace(progress, lr_factor=reaction.lr_factor)
            self.guard.resume(progress)
        return replace(progress, norm_mean=self.guard.norm_mean)

    def _watch(self, seen: int) -> dict[str, float]:
        """Measure the held-out loss and draw a grid, where they are due."""
        config = self.config
        if _is_due(config, seen, config.grid_images):
            self.watch.draw(seen)
        if _is_due(config, seen, config.held_out_images):
            return self.watch.measure(seen)
        return {}

    def _keep(self, progress: Progress, stops: bool) -> None:
        """Store averages and save a checkpoint, where they are due."""
        config, seen = self.config, progress.images_seen
        stores = self.stored.is_due(seen)
        if stores:
            self.stored.store(seen, self.whole)
        if stops or stores or _is_due(config, seen, config.checkpoint_images):
            payload = self.state.tensors() | self.averages.tensors()
            progress = replace(
                progress, num_steps=self.state.num_steps, loss_sums=self.meter.sums()
            )
            self.store.save(self.state.fragments, payload, progress)
        if stops or seen >= config.final_images:
            self.store.wait()

    # -- beginning and end ------------------------------------------------------------------------

    def begin(self) -> Progress:
        """Restore the newest sound checkpoint; without one, start as the job says."""
        progress = self._restore() or Progress()
        if not progress.images_seen:
            carry_over(self.job, self.state, self.averages)
        self.stored.forget_after(progress.images_seen)
        self.guard.resume(progress)
        self.meter.resume(progress.loss_sums)
        return progress

    def _restore(self) -> Progress | None:
        """Take weights, moments and averages from the newest sound checkpoint, if there is one."""
        checkpoint = self.store.load_newest()
        if checkpoint is None:
            return None
        num_steps = checkpoint.progress.num_steps
        self.state.load(checkpoint.read, optimizer=True, num_steps=num_steps)
        self.averages.load(checkpoint.read)
        return checkpoint.progress

    def whole(self, kind: str) -> dict[str, Tensor]:
        """Whole averaged weights by parameter name; called by all ranks together."""
        return self.state.whole(self.averages.tensors()[kind])

    def save_snapshot(self, end: Progress) -> None:
        """Leave the averaged weights as the result."""
        job = self.job
        average = self.stored.result(end.images_seen, self.whole, job.snapshot_path)
        if self.worker.rank == 0:
            snapshot = Snapshot(
                network=job.network,
                preconditioning=job.preconditioning,
                distribution=job.distribution,
                interval=job.serves or job.interval,
                images_seen=end.images_seen,
            )
            save_snapshot(job.snapshot_path, snapshot, average)
        torch.distributed.barrier()


def _is_due(config: TrainConfig, images_seen: int, every_images: int) -> bool:
    """Whether the batch that ends at `images_seen` crossed a multiple, or is the last; 0: never."""
    is_last = bool(every_images) and images_seen >= config.final_images
    return is_last or config.crosses(images_seen, every_images)
