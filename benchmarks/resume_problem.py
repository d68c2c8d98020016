"""The small training that `benchmarks.resume_equality` interrupts: the same for both sides.

A diary has one JSON line for every optimizer step: which pictures, and their loss. It is flushed
line by line, so that it is whole up to the step at which a process killed itself.
"""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ediffi.noise import SigmaDistribution
from ediffi.preconditioning import Preconditioning
from ediffi.shards import ShardFile, ShardRef, ShardWriter
from ediffi.unet import UNetConfig

NUM_SHARDS = 4
SHARD_IMAGES = 100
BATCH_IMAGES = 16  # 25 steps an epoch
CHECKPOINT_STEPS = 30
TOTAL_STEPS = 100
LR = 1e-3
SEED = 7
NETWORK = UNetConfig(
    image_px=16, patch_px=2, widths=(32, 64), num_blocks=1, self_attention_px=(4,), head_width=32
)
PRECONDITIONING = Preconditioning()
DISTRIBUTION = SigmaDistribution()


def write_pictures(folder: Path) -> None:
    """Write pictures of one coloured disc each."""
    from PIL import Image

    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:16, :16]
    for shard_index in range(NUM_SHARDS):
        with ShardWriter(_tar(folder, shard_index)) as writer:
            for image_index in range(SHARD_IMAGES):
                ground, disc = generator.integers(0, 256, (2, 3), dtype=np.uint8)
                row, column = generator.integers(4, 12, 2)
                inside = (rows - row) ** 2 + (columns - column) ** 2 < 16
                png = io.BytesIO()
                Image.fromarray(np.where(inside[..., None], disc, ground)).save(png, "png")
                key = f"{shard_index}-{image_index:03d}"
                writer.write(key, {"png": png.getvalue(), "txt": b"a disc"})


def shards(folder: Path) -> tuple[ShardRef, ...]:
    """What `write_pictures` wrote."""
    return tuple(
        ShardRef(
            name=f"{index:05d}",
            images=ShardFile(_tar(folder, index)),
            embeddings={},
            num_samples=SHARD_IMAGES,
        )
        for index in range(NUM_SHARDS)
    )


def _tar(folder: Path, shard_index: int) -> Path:
    return folder / f"{shard_index:05d}.tar"


@dataclass(frozen=True)
class Step:
    """What one optimizer step was made of."""

    pictures: tuple[str, ...]  # sorted keys
    loss: float


class Diary:
    """Writes one rank's steps, and kills this process with SIGKILL after step `kill_step`."""

    def __init__(self, path: Path, kill_step: int) -> None:
        self._path = path
        self._kill_step = kill_step

    def add(self, step: int, pictures: Sequence[str], loss: float) -> None:
        """Note a step; `step` counts from 1."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "pictures": list(pictures), "loss": loss}) + "\n")
        if step == self._kill_step:
            os.kill(os.getpid(), signal.SIGKILL)


def read_diaries(paths: Sequence[Path]) -> dict[int, Step]:
    """The steps of a run over all its ranks, by number. The loss is rank 0's: a mean over all."""
    pictures: dict[int, list[str]] = {}
    losses: dict[int, float] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            pictures.setdefault(entry["step"], []).extend(entry["pictures"])
            losses.setdefault(entry["step"], entry["loss"])
    return {step: Step(tuple(sorted(keys)), losses[step]) for step, keys in pictures.items()}
