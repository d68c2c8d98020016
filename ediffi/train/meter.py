"""What training reports between two rows: loss by noise level, speed, waiting, memory.

Sums stay on the device: reading a value at every step would stop a GPU. Only `read` waits for it.

Shape legend: B batch.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from ediffi.loss import NUM_SIGMA_BINS, sigma_bin_key
from ediffi.train.engine import Worker
from ediffi.train.flops import PeakFlops

_GIB = 2**30


class Meter:
    """Loss, speed and memory since the last reading.

    Args:
        worker: this process; the ranks add up their losses and speeds.
        peak: what the device could do at best; None leaves "mfu" out of the rows.
    """

    def __init__(self, worker: Worker, peak: PeakFlops | None = None) -> None:
        self._worker = worker
        self._peak = peak
        # Row 0 sums losses, row 1 counts the images behind them, row 2 counts all images, per
        # octile of the sigma distribution.
        self._bins = torch.zeros(3, NUM_SIGMA_BINS, dtype=torch.float64, device=worker.device)
        self._flops = 0.0  # of this rank
        self._num_steps = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out the time that passed since the last reading."""
        self._waited_s = self._paused_s = 0.0
        self._started_s = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        started_s = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - started_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time inside: measuring and drawing in between are no part of a step."""
        started_s = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - started_s

    def add(self, loss_B: Tensor, quantile_B: Tensor) -> None:
        """Note the losses of some images and where in the distribution their sigma lies.

        Losses that are not finite count as images but not in any mean: the step they belong to is
        refused and reported by the guard.
        """
        bin_B = (quantile_B * NUM_SIGMA_BINS).long().clamp_(max=NUM_SIGMA_BINS - 1)
        finite_B = loss_B.isfinite()
        finite_loss_B = torch.where(finite_B, loss_B, 0.0).double()
        counts_B = torch.ones_like(finite_loss_B)
        rows_3B = torch.stack([finite_loss_B, finite_B.double(), counts_B])
        self._bins.index_add_(1, bin_B.to(self._bins.device), rows_3B)

    def count_flops(self, flops: float) -> None:
        """Note the floating-point operations of one micro-batch; see `flops.TrainingFlops`."""
        self._flops += flops

    def count_step(self) -> None:
        """Note that an optimizer step ended, taken or refused."""
        self._num_steps += 1

    def read(self) -> dict[str, float]:
        """Means over all ranks since the last reading; called by all ranks together.

        Returns:
            "loss" and "loss/sigma_bin_00" to "_07" (octiles that were seen), means over images;
            "images_per_s" and "mfu" (a fraction of the peak of all devices) over all ranks;
            "step_s", "data_wait_fraction" and "memory_gib" of this rank. Memory is the highest
            since the last reading on CUDA, and of the process's whole life on a CPU. "loss" is
            left out when none was finite.
        """
        sums, counts, images, all_flops = self._gather()
        elapsed_s = time.perf_counter() - self._started_s - self._paused_s
        row = {
            "images_per_s": sum(images) / elapsed_s,
            "data_wait_fraction": self._waited_s / elapsed_s,
            "memory_gib": _take_peak_memory_bytes(self._worker.device) / _GIB,
        }
        if sum(counts):
            row["loss"] = sum(sums) / sum(counts)
        if self._num_steps:
            row["step_s"] = elapsed_s / self._num_steps
        if self._peak is not None:
            best_flops = self._peak.flops_per_s * self._worker.world_size * elapsed_s
            row["mfu"] = all_flops / best_flops
        for index, (loss, count) in enumerate(zip(sums, counts)):
            if count:
                row[sigma_bin_key("loss", index)] = loss / count
        self._bins.zero_()
        self._flops, self._num_steps = 0.0, 0
        self.restart_clock()
        return row

    def sums(self) -> tuple[tuple[float, ...], ...]:
        """What every rank has summed up of losses since the last reading, for a checkpoint.

        Called by all ranks together.
        """
        mine = self._bins[:2].flatten()
        gathered = [torch.empty_like(mine) for _ in range(self._worker.world_size)]
        dist.all_gather(gathered, mine)
        return tuple(tuple(one.tolist()) for one in gathered)

    def resume(self, sums: Sequence[Sequence[float]]) -> None:
        """Go on from `sums`; on as many ranks as before with the very same rounding."""
        if not sums:
            return
        own = torch.tensor(sums, dtype=torch.float64)
        if len(sums) == self._worker.world_size:
            own = own[self._worker.rank]
        else:
            own = own.sum(dim=0) if self._worker.rank == 0 else torch.zeros_like(own[0])
        self._bins[:2] = own.view(2, NUM_SIGMA_BINS).to(self._bins.device)

    def _gather(self) -> tuple[list[float], list[float], list[float], float]:
        """Loss sums, counts of finite losses, images per bin, and FLOPs, over all ranks."""
        flops = torch.tensor([self._flops], dtype=torch.float64, device=self._bins.device)
        totals = torch.cat([self._bins.flatten(), flops])
        dist.all_reduce(totals)
        *bins, all_flops = totals.tolist()
        return (
            bins[:NUM_SIGMA_BINS],
            bins[NUM_SIGMA_BINS : 2 * NUM_SIGMA_BINS],
            bins[2 * NUM_SIGMA_BINS :],
            all_flops,
        )


def _take_peak_memory_bytes(device: torch.device) -> int:
    """Highest memory since the last call (CUDA's allocator) or ever (resident, of the process)."""
    if device.type == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak_bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
