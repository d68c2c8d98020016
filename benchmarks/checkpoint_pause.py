"""What a checkpoint costs training: `python -m benchmarks.checkpoint_pause`.

The network, batch and interval are those of `recipes/emoji-32px.yaml`: 64 pictures a step, a
checkpoint every 20,000. Every checkpoint holds weights, both moments and the average. Ours copies
them, lets a thread write, hash and fsync them, and trains on; the other sides write on the spot:
DeepSpeed's `save_checkpoint` (the average with `torch.save` beside it), and `torch.save` of it all.
Neither of them hashes or waits for the disk.

Two numbers a side: how long `save` keeps the training thread, and what the checkpoint costs in all:
the same number of steps with it and without it, the steps without measured just before and after,
so that what the writing thread takes from the steps is counted. The cost is told as a share of the
interval between two checkpoints.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.interleave import our_versions, row, write_rows
from benchmarks.report import Row
from benchmarks.step_time import NETWORK, NUM_TOKENS, STREAMS
from ediffi.conditioning import Conditioning, Stream
from ediffi.loss import denoising_loss
from ediffi.preconditioning import Denoiser, Preconditioning
from ediffi.train.checkpoint import CheckpointStore, Progress
from ediffi.train.checkpoint_file import MARKER
from ediffi.train.config import TrainConfig
from ediffi.train.ema import Averages
from ediffi.train.engine import join_process_group, make_engine, take_step
from ediffi.train.state import ShardedState
from ediffi.unet import UNet

COMMAND = "python -m benchmarks.checkpoint_pause"
OTHERS = {"deepspeed": "DeepSpeed save_checkpoint", "torch": "torch.save"}
CONFIG = TrainConfig(
    total_images=420_000,
    batch_images=64,
    micro_batch_images=64,
    lr=1e-3,
    ema_half_life_images=10_000,
    precision="bf16",
    checkpoint_images=20_000,
    log_images=5_000,
)


@dataclass(frozen=True)
class Cost:
    """Of one checkpoint."""

    pause_s: float  # the training thread stands still
    interval_percent: float  # all time lost, as a share of the interval


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the rows; `--json` writes them to a file."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run: a smoke test")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--run-steps", type=int, default=5, help="steps that a save is timed with")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.quick:
        options.runs, options.run_steps = 1, 1
    torch.set_num_threads(options.threads)
    with TemporaryDirectory(prefix="ediffi-pause-", dir=Path.cwd()) as folder:
        costs = _measure(Path(folder), options.runs, options.run_steps)
    rows = [entry for name in OTHERS for entry in _rows(name, costs)]
    write_rows(rows, options.json)
    return 0


def _measure(folder: Path, runs: int, run_steps: int) -> dict[str, list[Cost]]:
    training = _Training(folder)
    sides = {
        "ours": training.save_ours,
        "deepspeed": training.save_deepspeed,
        "torch": training.save_torch,
    }
    training.seconds(run_steps)
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, save in sides.items():
            costs[name].append(training.cost(save, run_steps))
            print(name, costs[name][-1], file=sys.stderr)
    training.store.close()
    return costs


def _rows(other: str, costs: dict[str, list[Cost]]) -> list[Row]:
    at = f"{NETWORK.image_px} px U-Net, bf16"
    measures = {
        f"training thread stands still per checkpoint, {at}": ("s", "pause_s"),
        f"training time lost per checkpoint, share of the interval, {at}": (
            "%",
            "interval_percent",
        ),
    }
    return [
        row(
            measure,
            unit,
            [getattr(cost, field) for cost in costs["ours"]],
            [getattr(cost, field) for cost in costs[other]],
            other_name=OTHERS[other],
            better="lower",
            command=COMMAND,
            versions=our_versions("torch", "deepspeed", "safetensors")
            | {"threads": str(torch.get_num_threads())},
        )
        for measure, (unit, field) in measures.items()
    ]


class _Training:
    """The recipe's network in our engine, on one batch held in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        worker = join_process_group()
        torch.manual_seed(0)
        self._network = UNet(NETWORK)
        self._preconditioning = Preconditioning()
        denoiser = Denoiser(self._network, self._preconditioning)
        self._engine = make_engine(denoiser, CONFIG, worker, math.isfinite)
        self._state = ShardedState(self._engine, self._network, worker)
        self._averages = Averages(CONFIG, self._state.fragments)
        self.store = CheckpointStore(folder / "ours", keep=2, keep_every_images=0, worker=worker)
        self._images_BCHW = torch.randn(CONFIG.batch_images, 3, NETWORK.image_px, NETWORK.image_px)
        self._conditioning = _conditioning(CONFIG.batch_images)
        self._images_seen = 0

    def seconds(self, num_steps: int) -> float:
        """Time some steps."""
        started_s = time.perf_counter()
        for _ in range(num_steps):
            self._images_seen += CONFIG.batch_images
            self._step()
        return time.perf_counter() - started_s

    def cost(self, save: Callable[[], None], num_steps: int) -> Cost:
        """Time a save and the steps after it, between two stretches of as many steps."""
        before_s = self.seconds(num_steps)
        started_s = time.perf_counter()
        save()
        pause_s = time.perf_counter() - started_s
        steps_s, num_steps_beside = 0.0, 0
        while num_steps_beside < num_steps or not self._written():
            steps_s += self.seconds(1)
            num_steps_beside += 1
        step_s = (before_s + self.seconds(num_steps)) / (2 * num_steps)
        # Where steps vary by more than the writing thread takes, the pause is what is certain.
        lost_s = pause_s + max(steps_s - num_steps_beside * step_s, 0.0)
        interval_s = step_s * CONFIG.checkpoint_images / CONFIG.batch_images
        return Cost(pause_s, 100 * lost_s / interval_s)

    def _written(self) -> bool:
        """Whether the thread has completed our newest checkpoint."""
        return all((path / MARKER).exists() for path in (self._folder / "ours").iterdir())

    def save_ours(self) -> None:
        """Copy, and leave the rest to the thread."""
        payload = self._state.tensors() | self._averages.tensors()
        progress = Progress(images_seen=self._images_seen, num_steps=self._state.num_steps)
        self.store.save(self._state.fragments, payload, progress)

    def save_deepspeed(self) -> None:
        """Write DeepSpeed's own files, and the average."""
        folder = self._emptied("deepspeed")
        self._engine.save_checkpoint(str(folder), tag="state", save_latest=False)
        torch.save(self._averages.tensors(), folder / "ema.pt")

    def save_torch(self) -> None:
        """Write one file, as a script would."""
        content: dict[str, Any] = {
            "weights": self._network.state_dict(),
            "optimizer": self._engine.basic_optimizer.state_dict(),
            "ema": self._averages.tensors(),
        }
        torch.save(content, self._emptied("torch") / "checkpoint.pt")

    def _emptied(self, name: str) -> Path:
        folder = self._folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def _step(self) -> None:
        sigma_B = torch.linspace(-3, 3, CONFIG.batch_images).exp()
        loss_B = denoising_loss(
            self._engine,
            self._images_BCHW,
            sigma_B,
            torch.randn_like(self._images_BCHW),
            self._conditioning,
            self._preconditioning,
        )
        self._engine.backward(loss_B.mean())
        assert take_step(self._engine, CONFIG) is not None, "one micro-batch a step"
        self._averages.update(self._images_seen)


def _conditioning(num_images: int) -> Conditioning:
    streams = {}
    for config in STREAMS:
        tokens_BTD = mask_BT = pooled_BD = None
        if config.token_width:
            tokens_BTD = torch.randn(num_images, NUM_TOKENS, config.token_width)
            mask_BT = torch.ones(num_images, NUM_TOKENS, dtype=torch.bool)
        if config.pooled_width:
            pooled_BD = torch.randn(num_images, config.pooled_width)
        streams[config.name] = Stream(tokens_BTD, mask_BT, pooled_BD)
    return Conditioning(streams, num_images)


if __name__ == "__main__":
    sys.exit(main())
