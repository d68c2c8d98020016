"""Our training step against the same network in a bare PyTorch loop: `-m benchmarks.step_time`.

The network and the batch are those of `recipes/emoji-32px.yaml`. Both sides draw from the same few
batches, held in memory, and compute the same loss. Ours is the whole loop: DeepSpeed's engine at
stage 0, the guard, the average of the weights, the meter, the wish to stop. The other side is what
one would write by hand: zero the gradients, forward, backward, clip, fused AdamW. One process takes
a few steps of one, then of the other, and so on.
"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from benchmarks.interleave import our_versions, row, write_rows
from benchmarks.report import Row
from ediffi.conditioning import StreamConfig
from ediffi.loss import denoising_loss
from ediffi.noise import SigmaDistribution
from ediffi.preconditioning import Denoiser, Preconditioning
from ediffi.shards import ShardFile, ShardRef, ShardWriter, encode_tensors
from ediffi.train import loop
from ediffi.train.config import Precision, TrainConfig
from ediffi.train.data import Batch, load_batches
from ediffi.train.ema import Averages
from ediffi.train.job import TrainJob
from ediffi.train.meter import Meter
from ediffi.unet import UNet, UNetConfig

COMMAND = "python -m benchmarks.step_time"
NUM_BATCHES = 4
NUM_TOKENS = 24
WARMUP_RUNS = 2
STREAMS = (
    StreamConfig(name="t5", token_width=384, dropout=0.1),
    StreamConfig(name="clip_text", token_width=128, pooled_width=128, dropout=0.1),
    StreamConfig(name="clip_image", pooled_width=128, pooled_as_token=True, dropout=0.9),
)
NETWORK = UNetConfig(
    image_px=32,
    patch_px=2,
    widths=(48, 96, 128),
    num_blocks=1,
    self_attention_px=(4,),
    cross_attention_px=(8, 4),
    head_width=32,
    context_width=128,
    embedding_width=256,
    streams=STREAMS,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the rows; `--json` writes them to a file."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run: a smoke test")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--run-steps", type=int, default=5, help="steps of one side at a time")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.quick:
        options.runs, options.run_steps = 1, 1
    torch.set_num_threads(options.threads)
    rows = []
    for precision in ("fp32", "bf16"):
        with TemporaryDirectory(prefix="ediffi-step-") as folder:
            rows += _measure(Path(folder), precision, options.runs, options.run_steps)
    write_rows(rows, options.json)
    return 0


def _measure(folder: Path, precision: Precision, runs: int, run_steps: int) -> list[Row]:
    job = _job(folder, precision, (runs + WARMUP_RUNS) * run_steps, run_steps)
    series = _Series(job, run_steps)
    series.train()
    sides = {name: seconds[WARMUP_RUNS:] for name, seconds in series.step_ms.items()}
    without = [ours - average for ours, average in zip(sides["ours"], sides["average"])]
    at = f"32 px U-Net of {series.num_parameters / 1e6:.1f}M, {precision}"
    return [
        _row(f"optimizer step, {at}", sides["ours"], "bare PyTorch loop", sides["bare"]),
        _row(f"the same without averaging, {at}", without, "bare PyTorch loop", sides["bare"]),
        _row(f"averaging the weights (EMA), {at}", sides["average"], "our step", sides["ours"]),
        _row(f"the meter, {at}", sides["meter"], "our step", sides["ours"]),
    ]


def _row(measure: str, ours: list[float], other_name: str, other: list[float]) -> Row:
    return row(
        measure,
        "ms",
        ours,
        other,
        other_name=other_name,
        better="lower",
        command=COMMAND,
        versions=our_versions("torch", "deepspeed")
        | {"threads": str(torch.get_num_threads()), "allocator": "the system's"},
    )


class _Series:
    """The two sides taking turns: the bare loop runs whenever ours reports a row."""

    def __init__(self, job: TrainJob, run_steps: int) -> None:
        self._job = job
        self._run_steps = run_steps
        self._bare: _BareLoop | None = None
        self._spent_s = {"average": 0.0, "meter": 0.0}
        self.step_ms: dict[str, list[float]] = {
            name: [] for name in ("ours", "bare", *self._spent_s)
        }
        self.num_parameters = 0

    def train(self) -> None:
        """Run both sides to the end."""
        with ExitStack() as stack:
            for owner, method, name in (
                (Averages, "update", "average"),
                (Meter, "add", "meter"),
                (Meter, "count_flops", "meter"),
                (Meter, "count_step", "meter"),
            ):
                timed = self._timed(getattr(owner, method), name)
                stack.enter_context(patch.object(owner, method, timed))
            stack.enter_context(patch.object(loop, "load_batches", self._load))
            summary = loop.train(self._job, self._report)
        self.num_parameters = int(summary["num_parameters"])

    def _load(self, *arguments: Any) -> Iterator[Batch]:
        """Stands for the loader: a few batches, held in memory, over and over."""
        batches: list[Any] = list(itertools.islice(load_batches(*arguments), NUM_BATCHES))
        self._bare = _BareLoop(self._job, batches)
        return itertools.cycle(batches)

    def _timed(self, method: Callable[..., None], name: str) -> Callable[..., None]:
        def timed(*arguments: Any) -> None:
            started_s = time.perf_counter()
            method(*arguments)
            self._spent_s[name] += time.perf_counter() - started_s

        return timed

    def _report(self, found: dict[str, float]) -> None:
        self.step_ms["ours"].append(1000 * found["step_s"])
        for name, spent_s in self._spent_s.items():
            self.step_ms[name].append(1000 * spent_s / self._run_steps)
            self._spent_s[name] = 0.0
        assert self._bare is not None, "batches come before rows"
        self.step_ms["bare"].append(1000 * self._bare.seconds(self._run_steps) / self._run_steps)
        print({name: round(ms[-1], 3) for name, ms in self.step_ms.items()}, file=sys.stderr)


class _BareLoop:
    """The other side."""

    def __init__(self, job: TrainJob, batches: Sequence[Batch]) -> None:
        self._job = job
        self._batches = itertools.cycle(batches)
        torch.manual_seed(0)
        network = UNet(NETWORK)
        self._denoiser: nn.Module = Denoiser(network, job.preconditioning)
        if job.config.precision == "bf16":
            network.forward = torch.autocast("cpu", torch.bfloat16)(network.forward)  # type: ignore[method-assign]
        self._optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=job.config.lr,
            betas=(job.config.beta1, job.config.beta2),
            weight_decay=job.config.weight_decay,
            fused=True,
        )

    def seconds(self, num_steps: int) -> float:
        """Time some steps."""
        started_s = time.perf_counter()
        for _ in range(num_steps):
            self._step(next(self._batches))
        return time.perf_counter() - started_s

    def _step(self, batch: Batch) -> None:
        job = self._job
        self._optimizer.zero_grad(set_to_none=True)
        loss_B = denoising_loss(
            self._denoiser,
            batch.images_BCHW,
            job.distribution.sigma_at(batch.u_B, job.interval),
            batch.noise_BCHW,
            batch.conditioning,
            job.preconditioning,
        )
        loss_B.mean().backward()
        nn.utils.clip_grad_norm_(self._denoiser.parameters(), job.config.grad_clip)
        self._optimizer.step()


def _job(folder: Path, precision: Precision, num_steps: int, run_steps: int) -> TrainJob:
    batch_images = 64
    return TrainJob(
        network=NETWORK,
        preconditioning=Preconditioning(),
        distribution=SigmaDistribution(log_mean=-0.5, log_std=1.4),
        config=TrainConfig(
            total_images=num_steps * batch_images,
            batch_images=batch_images,
            lr=1e-3,
            ema_half_life_images=10_000,
            precision=precision,
            checkpoint_images=num_steps * batch_images,
            log_images=run_steps * batch_images,
        ),
        shards=(_write_shard(folder, NUM_BATCHES * batch_images),),
        checkpoint_path=folder / "checkpoints",
        snapshot_path=folder / "snapshot",
    )


def _write_shard(folder: Path, num_samples: int) -> ShardRef:
    """Pictures of noise, with embeddings of noise."""
    from PIL import Image

    generator = np.random.default_rng(0)
    paths = {name: folder / name / "00000.tar" for name in ("images", *(s.name for s in STREAMS))}
    with ExitStack() as stack:
        writers = {}
        for name, path in paths.items():
            path.parent.mkdir()
            writers[name] = stack.enter_context(ShardWriter(path))
        for key in (f"{index:05d}" for index in range(num_samples)):
            png = io.BytesIO()
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(png, "png")
            writers["images"].write(key, {"png": png.getvalue(), "txt": b"noise"})
            for stream in STREAMS:
                data = encode_tensors(_embeddings(stream, generator))
                writers[stream.name].write(key, {"safetensors": data})
    return ShardRef(
        name="00000",
        images=ShardFile(paths["images"]),
        embeddings={stream.name: ShardFile(paths[stream.name]) for stream in STREAMS},
        num_samples=num_samples,
    )


def _embeddings(stream: StreamConfig, generator: np.random.Generator) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {}
    if stream.token_width:
        shapes["tokens"] = (NUM_TOKENS, stream.token_width)
    if stream.pooled_width:
        shapes["pooled"] = (stream.pooled_width,)
    return {
        name: torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
        for name, shape in shapes.items()
    }


if __name__ == "__main__":
    sys.exit(main())
