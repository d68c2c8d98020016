"""A toy data set and training job that the tests of training share.

Run as a script it is one of several ranks: see `run_ranks`.
"""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import ediffi
from ediffi.conditioning import StreamConfig
from ediffi.noise import SigmaDistribution
from ediffi.preconditioning import Preconditioning
from ediffi.shards import ShardFile, ShardRef, ShardWriter, encode_tensors
from ediffi.snapshot import load_snapshot
from ediffi.train.config import TrainConfig
from ediffi.train.loop import Stopped, TrainJob, train
from ediffi.unet import UNetConfig

STREAMS = (
    StreamConfig(name="t5", token_width=6, dropout=0.25),
    StreamConfig(name="clip_image", pooled_width=4, pooled_as_token=True, dropout=0.5),
)
NETWORK = UNetConfig(
    image_px=8,
    widths=(16, 16),
    num_blocks=1,
    cross_attention_px=(4,),
    head_width=8,
    context_width=16,
    embedding_width=16,
    streams=STREAMS,
)
CONFIG = TrainConfig(
    total_images=96,
    batch_images=16,
    micro_batch_images=8,
    lr=2e-3,
    warmup_images=32,
    lr_schedule="cosine",
    ema_half_life_images=64,
    ema_ramp_fraction=0.5,
    checkpoint_images=32,
    log_images=16,
    seed=5,
    flip=True,
)

Rows = list[dict[str, float]]
CLOCK = ("images_per_s", "data_wait_fraction", "step_s", "memory_gib", "mfu")


def write_shards(directory: Path) -> tuple[ShardRef, ...]:
    """Two shards of twelve 8 px pictures of one colour each, with embeddings; made only once."""
    refs = []
    for number, name in enumerate(("00000", "00001")):
        paths = {s.name: directory / s.name / f"{name}.tar" for s in STREAMS}
        image_path = directory / "images" / f"{name}.tar"
        if not image_path.exists():
            write_shard(image_path, paths, seed=number)
        refs.append(
            ShardRef(
                name=name,
                images=ShardFile(image_path),
                embeddings={stream: ShardFile(path) for stream, path in paths.items()},
                num_samples=12,
            )
        )
    return tuple(refs)


def write_shard(image_path: Path, paths: dict[str, Path], seed: int) -> None:
    """Write twelve samples: the pooled vector tells the colour, the tokens are noise."""
    generator = np.random.default_rng(seed)
    for path in (image_path, *paths.values()):
        path.parent.mkdir(parents=True, exist_ok=True)
    with (
        ShardWriter(image_path) as images,
        ShardWriter(paths["t5"]) as t5,
        ShardWriter(paths["clip_image"]) as clip,
    ):
        for key in (f"{seed}-{index:04d}" for index in range(12)):
            colour = generator.integers(0, 256, 3, dtype=np.uint8)
            png = io.BytesIO()
            Image.fromarray(np.tile(colour, (8, 8, 1))).save(png, "png")
            images.write(key, {"png": png.getvalue(), "txt": b"a colour"})
            num_tokens = int(generator.integers(1, 6))
            tokens = torch.from_numpy(generator.standard_normal((num_tokens, 6), np.float32))
            t5.write(key, {"safetensors": encode_tensors({"tokens": tokens})})
            pooled = torch.tensor([*(colour / 255.0), 1.0], dtype=torch.float32)
            clip.write(key, {"safetensors": encode_tensors({"pooled": pooled})})


def make_job(directory: Path, **changes: Any) -> TrainJob:
    """Make a job whose files all lie under `directory`."""
    return replace(
        TrainJob(
            network=NETWORK,
            preconditioning=Preconditioning(),
            distribution=SigmaDistribution(),
            config=CONFIG,
            shards=write_shards(directory / "shards"),
            checkpoint_path=directory / "checkpoints",
            snapshot_path=directory / "snapshot",
        ),
        **changes,
    )


def run(
    job: TrainJob, should_stop: Callable[[], bool] = lambda: False
) -> tuple[dict[str, float], Rows]:
    """Train, and collect the rows without what depends on the clock."""
    rows: Rows = []
    summary = train(job, rows.append, should_stop)
    return summary, [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def weights(job: TrainJob) -> dict[str, torch.Tensor]:
    """EMA weights of the job's result."""
    return load_snapshot(job.snapshot_path)[1].network.state_dict()


class Killed(Exception):
    """Stands for whatever ends a process in the middle of training."""


def after(num_batches: int, error: type[Exception] | None = None) -> Callable[[], bool]:
    """Make a `should_stop` that says yes, or raises, once so many batches are trained."""
    calls = 0

    def should_stop() -> bool:
        nonlocal calls
        calls += 1
        if calls == num_batches and error is not None:
            raise error
        return calls == num_batches

    return should_stop


def run_ranks(world_size: int, runs: Sequence[Mapping[str, Any]]) -> list[Rows]:
    """Train one run after the other with that many processes over gloo.

    Args:
        world_size: number of processes.
        runs: of each its "directory", "config" (fields that differ from CONFIG) and optionally
            "stop_after": the number of batches after which it is asked to stop.

    Returns:
        The rows of each run, as the last rank saw them.
    """
    for one in runs:  # here: the ranks would write them side by side
        write_shards(Path(one["directory"]) / "shards")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(ediffi.__file__).parents[1]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, json.dumps(list(runs), default=str)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:  # a rank whose peer has died waits for it
        for process in processes:
            process.kill()
    for process, (_, narration) in zip(processes, outputs):
        assert process.returncode == 0, narration
    return json.loads(outputs[-1][0].splitlines()[-1])


def _run_all(runs: Sequence[Mapping[str, Any]]) -> list[Rows]:
    """What one rank does."""
    found = []
    for one in runs:
        job = make_job(Path(one["directory"]), config=replace(CONFIG, **one.get("config", {})))
        rows: Rows = []
        with suppress(Stopped):
            train(job, rows.append, after(one.get("stop_after", 0)))
        found.append([{k: v for k, v in row.items() if k not in CLOCK} for row in rows])
    return found


if __name__ == "__main__":
    print(json.dumps(_run_all(json.loads(sys.argv[1]))))
