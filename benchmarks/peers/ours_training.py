"""Our training loop on the problem of `benchmarks.resume_equality`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.resume_problem import (
    BATCH_IMAGES,
    CHECKPOINT_STEPS,
    DISTRIBUTION,
    LR,
    NETWORK,
    PRECONDITIONING,
    SEED,
    TOTAL_STEPS,
    Diary,
    shards,
)
from ediffi.shards import JoinedShards, Sample
from ediffi.train.config import TrainConfig
from ediffi.train.loop import TrainJob, train

CONFIG = TrainConfig(
    total_images=TOTAL_STEPS * BATCH_IMAGES,
    batch_images=BATCH_IMAGES,
    micro_batch_images=BATCH_IMAGES,
    lr=LR,
    ema_half_life_images=400,
    checkpoint_images=CHECKPOINT_STEPS * BATCH_IMAGES,
    log_images=BATCH_IMAGES,
    seed=SEED,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, or go on training, by one process or as one rank of several."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="of the run's checkpoints")
    parser.add_argument("--diary", type=Path, required=True)
    parser.add_argument("--kill-step", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    diary = Diary(options.diary, options.kill_step)
    read = _record_reads()
    rank_images = BATCH_IMAGES // int(os.environ.get("WORLD_SIZE", "1"))

    def report(row: dict[str, float]) -> None:
        # Reading may run ahead of training; the order is that of training all the same.
        pictures = read[:rank_images]
        del read[:rank_images]
        diary.add(int(row["images"]) // BATCH_IMAGES, pictures, row["loss"])

    job = TrainJob(
        network=NETWORK,
        preconditioning=PRECONDITIONING,
        distribution=DISTRIBUTION,
        config=CONFIG,
        shards=shards(options.pictures),
        checkpoint_path=options.folder / "checkpoints",
        snapshot_path=options.folder / "snapshot",
    )
    train(job, report)


def _record_reads() -> list[str]:
    """Have the loader's data set note the key of every picture it reads, in order."""
    read: list[str] = []
    load = JoinedShards.__getitems__

    def load_and_note(self: JoinedShards, sample_indices: Sequence[int]) -> list[Sample]:
        samples = load(self, sample_indices)
        read.extend(sample.key for sample in samples)
        return samples

    setattr(JoinedShards, "__getitems__", load_and_note)  # noqa: B010 (mypy forbids assigning)
    return read


if __name__ == "__main__":
    main()
