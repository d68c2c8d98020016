"""A tiny network trained step by step, without a data set; run as a script it is one of two ranks.

Shared by the tests of state, checkpoints and engine. `tour` takes one rank through every ZeRO stage
in one process: starting one costs many seconds of imports.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ediffi.train.checkpoint import Checkpoint, CheckpointStore, Progress
from ediffi.train.config import TrainConfig
from ediffi.train.engine import Step, join_process_group, make_engine, take_step
from ediffi.train.state import ShardedState

BATCH_IMAGES = 8
# Every way of keeping the state; offload changes where it lies, not what it is.
SETTINGS: dict[str, dict[str, Any]] = {
    "0": {"zero_stage": 0},
    "1": {"zero_stage": 1},
    "2": {"zero_stage": 2},
    "3": {"zero_stage": 3},
    "1-offload": {"zero_stage": 1, "offload_optimizer": "cpu"},
    "2-offload": {"zero_stage": 2, "offload_optimizer": "cpu"},
    "3-offload": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
}
SAVED, END = 3, 5  # steps before a checkpoint, and altogether


class Toy(nn.Module):
    """Stands for a denoiser: a network of odd sizes, so that no partition comes out even.

    One matrix is above the size up to which ZeRO-3 keeps parameters whole.
    """

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(7)
            self.network = nn.Sequential(
                nn.Linear(5, 401), nn.GELU(), nn.Linear(401, 301), nn.GELU(), nn.Linear(301, 3)
            )
        self.network.register_buffer("frequencies", torch.arange(3.0))

    def forward(self, x_BD: Tensor) -> Tensor:
        """Three outputs for five inputs."""
        return self.network(x_BD)


class Training:
    """The toy in an engine, step by step; batch i is a function of i.

    Args:
        directory: of checkpoints.
        guard: see `make_engine`.
        changes: to the training config.
    """

    def __init__(
        self, directory: Path, *, guard: Callable[[float], bool] = math.isfinite, **changes: Any
    ) -> None:
        self.config = TrainConfig(
            **{
                "total_images": 800,
                "batch_images": BATCH_IMAGES,
                "micro_batch_images": 2,
                "lr": 1e-2,
                "ema_half_life_images": 80,
                "checkpoint_images": 8,
                "log_images": 8,
                **changes,
            }
        )
        self.worker = join_process_group()
        self.toy = Toy()
        self.engine = make_engine(self.toy, self.config, self.worker, guard)
        self.state = ShardedState(self.engine, self.toy.network, self.worker)
        self.store = CheckpointStore(directory, keep=2, keep_every_images=0, worker=self.worker)
        self.images = 0
        self.loss = math.nan  # of this rank in the last step

    def step(self, *, poison: bool = False) -> Step:
        """Train on the next batch; `poison` makes the last rank's gradient nan."""
        generator = torch.Generator().manual_seed(self.images)
        batch_BD = torch.randn(BATCH_IMAGES, 5, generator=generator)
        rank_BD = batch_BD.chunk(self.worker.world_size)[self.worker.rank]
        losses, step = [], None
        for x_BD in rank_BD.split(self.config.micro_batch(self.worker.world_size)):
            loss = (self.engine(x_BD) - x_BD[:, :3]).square().mean()
            losses.append(loss.item())
            if poison and self.worker.rank == self.worker.world_size - 1:
                loss = loss * math.nan
            self.engine.backward(loss)
            step = take_step(self.engine, self.config)
        assert step is not None
        self.images += BATCH_IMAGES
        self.loss = sum(losses) / len(losses)
        return step

    def save(self) -> None:
        """Save a checkpoint and wait until it is complete."""
        progress = Progress(images_seen=self.images, loss=0.25, num_steps=self.state.num_steps)
        self.store.save(self.state.fragments, self.state.tensors(), progress)
        self.store.wait()

    def load(self) -> Progress:
        """Go on from the newest sound checkpoint, if there is one."""
        checkpoint = self.store.load_newest()
        if checkpoint is None:
            return Progress()
        self.take(checkpoint)
        return checkpoint.progress

    def take(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""
        num_steps = checkpoint.progress.num_steps
        self.state.load(checkpoint.read, optimizer=True, num_steps=num_steps)
        self.images = checkpoint.progress.images_seen

    def held(self) -> list[Tensor]:
        """Copies of all that this rank keeps."""
        return [tensor.clone() for tensors in self.state.tensors().values() for tensor in tensors]

    def outcome(self, norms: list[float]) -> dict[str, Any]:
        """What to compare runs by: norms of the gradients, and the weights."""
        whole = self.state.whole(self.state.tensors()["weights"])
        digest = hashlib.sha256()
        for tensor in whole.values():
            digest.update(tensor.numpy().tobytes())
        sums = [tensor.double().sum().item() for tensor in whole.values()]
        return {"norms": norms, "sums": sums, "sha256": digest.hexdigest()}

    def norms(self, num_steps: int) -> list[float]:
        """Take steps; the norm of each gradient, which is the same on all ranks."""
        return [self.step().grad_norm for _ in range(num_steps)]


@contextmanager
def training(directory: Path, **changes: Any) -> Iterator[Training]:
    """Make a `Training` whose engine and thread end with the context."""
    made = Training(directory, **changes)
    try:
        yield made
    finally:
        made.store.close()
        made.engine.destroy()


def begin(root: Path, name: str) -> dict[str, Any]:
    """Train with the setting `name` to the end, with a checkpoint on the way."""
    with training(root / name, **SETTINGS[name]) as run:
        norms = run.norms(SAVED)
        run.save()
        norms += run.norms(END - SAVED)
        return run.outcome(norms)


def go_on(root: Path, written_by: str, name: str) -> dict[str, Any]:
    """Go on from the checkpoint of one setting with another."""
    with training(root / written_by, **SETTINGS[name]) as run:
        assert run.load().images_seen == SAVED * BATCH_IMAGES
        assert run.state.num_steps == SAVED
        return run.outcome(run.norms(END - SAVED))


def tour(own: Path, other: Path) -> dict[str, Any]:
    """Every setting from the beginning, resumed, and resumed from what `other` holds.

    Args:
        own: checkpoints of this number of ranks are written here.
        other: those of another number of ranks lie here.
    """
    found: dict[str, Any] = {"begun": {}, "resumed": {}, "crossed": {}, "refused": {}}
    for name in SETTINGS:
        found["begun"][name] = begin(own, name)
        found["resumed"][name] = go_on(own, name, name)
        found["crossed"][name] = go_on(other, name, name)
        found["refused"][name] = refusals(own / f"refused-{name}", name)
    return found


def refusals(directory: Path, name: str) -> dict[str, Any]:
    """A step that the guard refuses, one whose gradient is nan, and one that is taken."""
    asked: list[float] = []

    def guard(norm: float) -> bool:
        asked.append(norm)
        return len(asked) != 2

    with training(directory, guard=guard, **SETTINGS[name]) as run:
        run.step()
        before = run.held()
        steps = [run.step(), run.step(poison=True)]
        unchanged = all(map(torch.equal, run.held(), before))
        run.images -= 2 * BATCH_IMAGES  # the batch that an undisturbed run would see second
        steps.append(run.step())
        return {
            "taken": [step.taken for step in steps],
            "norms": [step.grad_norm for step in steps],
            "asked": asked,
            "unchanged": unchanged,
            "num_steps": run.state.num_steps,
        }


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = tour(Path(sys.argv[1]), Path(sys.argv[2]))
    print(json.dumps(result))
