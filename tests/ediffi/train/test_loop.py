"""The training loop end to end, on a toy data set; run as a script it is one of several ranks."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ediffi
from ediffi.conditioning import StreamConfig
from ediffi.loss import denoising_loss
from ediffi.noise import NoiseInterval, SigmaDistribution, tree_node
from ediffi.preconditioning import Preconditioning
from ediffi.shards import ShardFile, ShardRef, ShardWriter, encode_tensors
from ediffi.snapshot import load_snapshot
from ediffi.train import loop
from ediffi.train.config import TrainConfig
from ediffi.train.loop import TrainingDiverged, TrainJob, train
from ediffi.unet import UNetConfig

# DeepSpeed 0.19 at stage 3 calls what torch 2.14 renames.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning")

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
Reference = tuple[TrainJob, Rows]


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


def run(job: TrainJob) -> tuple[dict[str, float], Rows]:
    """Train, and collect the rows without what depends on the clock."""
    rows: Rows = []
    summary = train(job, rows.append)
    clock = ("images_per_s", "data_wait_fraction")
    return summary, [{k: v for k, v in row.items() if k not in clock} for row in rows]


def weights(job: TrainJob) -> dict[str, torch.Tensor]:
    """EMA weights of the job's result."""
    return load_snapshot(job.snapshot_path)[1].network.state_dict()


def assert_close(job: TrainJob, rows: Rows, reference: Reference) -> None:
    """Every number reported and every EMA weight is the reference's, up to float32 rounding."""
    expected_job, expected_rows = reference
    for found, row in zip(rows, expected_rows, strict=True):
        assert found == pytest.approx(row, abs=1e-5, rel=1e-5)
    found_weights = weights(job)
    for name, weight in weights(expected_job).items():
        torch.testing.assert_close(found_weights[name], weight, atol=1e-5, rtol=1e-4)


def losses(rows: Rows) -> list[float]:
    """Loss of every row."""
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """An undisturbed run of `CONFIG`, and its rows."""
    job = make_job(tmp_path_factory.mktemp("reference"))
    return job, run(job)[1]


class Killed(Exception):
    """Stands for whatever ends a process in the middle of training."""


def killer(at_images: int) -> Callable[[dict[str, float]], None]:
    """Make a report callback that ends training at the row of `at_images`."""

    def report(row: dict[str, float]) -> None:
        if row["images"] == at_images:
            raise Killed

    return report


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_resumed_run_equals_undisturbed_run_bit_by_bit(tmp_path: Path, zero_stage: int) -> None:
    """A run ended between checkpoints, then called again, ends with equal losses and weights."""
    config = replace(CONFIG, zero_stage=zero_stage)
    whole = make_job(tmp_path / "whole", config=config)
    halves = make_job(tmp_path / "halves", config=config)
    _, expected = run(whole)

    with pytest.raises(Killed):
        train(halves, killer(48))
    summary, resumed = run(halves)

    assert summary["resumed_from_images"] == 32
    assert resumed == [row for row in expected if row["images"] > 32]
    for name, weight in weights(whole).items():
        assert torch.equal(weights(halves)[name], weight), name


def test_finished_run_called_again_only_writes_its_snapshot(tmp_path: Path) -> None:
    """A job whose last checkpoint is complete trains nothing and keeps its final loss."""
    job = make_job(tmp_path)
    first, _ = run(job)
    (job.snapshot_path / "snapshot.json").unlink()

    second, rows = run(job)

    assert rows == []
    assert second == first | {"resumed_from_images": 96.0}
    assert load_snapshot(job.snapshot_path)[0].images_seen == 96


def test_total_images_is_rounded_up_to_whole_batches(tmp_path: Path) -> None:
    """A run asked for 17 images at batch 16 sees 32, and says so."""
    job = make_job(tmp_path, config=replace(CONFIG, total_images=17, warmup_images=0))

    summary, rows = run(job)

    assert summary["images_seen"] == 32
    assert rows[-1]["images"] == 32


def test_training_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    """Neither torch's nor numpy's global generator is advanced or reseeded."""
    job = make_job(tmp_path)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()

    run(job)

    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_micro_batches_do_not_change_the_losses(tmp_path: Path, reference: Reference) -> None:
    """Two micro-batches of 8 give what one pass over the batch of 16 gives."""
    whole = make_job(tmp_path, config=replace(CONFIG, micro_batch_images=16))

    assert losses(run(whole)[1]) == pytest.approx(losses(reference[1]), abs=1e-5)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_zero_stages_agree(tmp_path: Path, reference: Reference, zero_stage: int) -> None:
    """Stages 1 to 3 give the losses, gradient norms and EMA weights of stage 0."""
    sharded = make_job(tmp_path, config=replace(CONFIG, zero_stage=zero_stage))

    assert_close(sharded, run(sharded)[1], reference)


def test_bf16_keeps_float32_weights_and_stays_near_fp32(
    tmp_path: Path, reference: Reference
) -> None:
    """Autocast changes the loss by rounding only."""
    rounded = make_job(tmp_path, config=replace(CONFIG, precision="bf16"))

    found, expected = losses(run(rounded)[1]), losses(reference[1])

    assert found[-1] != expected[-1]
    assert found == pytest.approx(expected, rel=0.05)
    assert {weight.dtype for weight in weights(rounded).values()} == {torch.float32}


def test_loss_falls(tmp_path: Path) -> None:
    """On pictures of one colour each, sixty steps take a third off the loss."""
    config = replace(
        CONFIG,
        total_images=1440,
        batch_images=24,
        micro_batch_images=24,
        lr=1e-2,
        log_images=120,
        checkpoint_images=1440,
    )

    _, rows = run(make_job(tmp_path, config=config))

    assert rows[-1]["loss"] < 0.67 * rows[0]["loss"]


def test_row_loss_is_the_image_weighted_mean_of_its_bins(tmp_path: Path) -> None:
    """Over a stretch that fills all octiles equally often, the loss is the mean of the bins."""
    config = replace(CONFIG, log_images=96, checkpoint_images=96)

    _, (row,) = run(make_job(tmp_path, config=config))

    bins = [value for name, value in row.items() if name.startswith("loss/sigma_bin_0")]
    assert len(bins) == 8
    assert min(bins) < row["loss"] < max(bins)


@pytest.mark.parametrize(
    "interval", [tree_node(3, 0, SigmaDistribution()), tree_node(9, 511, SigmaDistribution())]
)
def test_expert_sees_only_its_noise_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: NoiseInterval
) -> None:
    """Every noise level of an expert's training lies inside its interval, and so do its bins."""
    seen = []

    def spy(denoiser: Any, images: Any, sigma_B: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(sigma_B)
        return denoising_loss(denoiser, images, sigma_B, *rest)

    monkeypatch.setattr(loop, "denoising_loss", spy)

    _, rows = run(make_job(tmp_path, interval=interval))

    assert sum(map(len, seen)) == 96
    assert interval.contains(torch.cat(seen)).all()
    octile = "loss/sigma_bin_00" if interval.sigma_min == 0 else "loss/sigma_bin_07"
    assert all(row[octile] == row["loss"] for row in rows)
    assert load_snapshot(tmp_path / "snapshot")[0].interval == interval


def test_expert_starts_from_its_parents_average(tmp_path: Path, reference: Reference) -> None:
    """With a learning rate of next to nothing the expert's result is its parent's snapshot."""
    base = reference[0]
    expert = make_job(tmp_path, initial=base.snapshot_path, config=replace(CONFIG, lr=1e-12))

    run(expert)

    for name, weight in weights(base).items():
        torch.testing.assert_close(weights(expert)[name], weight, atol=1e-8, rtol=0)


def test_expert_refuses_a_parent_of_another_architecture(
    tmp_path: Path, reference: Reference
) -> None:
    """The error names the field that differs, with both values; dropout may differ."""
    base = reference[0]
    other_dropout = tuple(replace(stream, dropout=0.0) for stream in STREAMS)
    network = replace(NETWORK, streams=other_dropout)
    loop.build_denoiser(make_job(tmp_path / "a", initial=base.snapshot_path, network=network))

    network = replace(NETWORK, embedding_width=32)
    with pytest.raises(ValueError, match="embedding_width must be 16 as in the parent, got 32"):
        loop.build_denoiser(make_job(tmp_path / "b", initial=base.snapshot_path, network=network))


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_divergence_is_an_error_that_tells_when(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero_stage: int
) -> None:
    """A loss that is not a number ends training at once and spoils no checkpoint."""

    def poisoned(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        loss_B = denoising_loss(*arguments)
        return loss_B * math.nan if len(calls) > 6 else loss_B  # two micro-batches per step

    calls: list[int] = []
    monkeypatch.setattr(loop, "denoising_loss", poisoned)
    job = make_job(tmp_path, config=replace(CONFIG, zero_stage=zero_stage))

    with pytest.raises(TrainingDiverged, match="at 64 images"):
        run(job)

    assert [path.name for path in job.checkpoint_path.iterdir()] == ["images-0000000032"]


def run_ranks(directory: Path, world_size: int, zero_stage: int) -> Rows:
    """Train with that many processes over gloo; return the rows of the last rank."""
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
            [sys.executable, __file__, str(directory), str(zero_stage)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:  # a rank whose peer has died waits for it
        for process in processes:
            process.kill()
    for process, (_, narration) in zip(processes, outputs):
        assert process.returncode == 0, narration
    return json.loads(outputs[-1][0].splitlines()[-1])


@pytest.fixture(scope="module", params=[0, 3])
def two_ranks(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[TrainJob, Rows]:
    """A run of `CONFIG` by two gloo ranks, without and with partitioned weights."""
    directory = tmp_path_factory.mktemp("two_ranks")
    job = make_job(directory, config=replace(CONFIG, zero_stage=request.param))
    return job, run_ranks(directory, 2, request.param)


@pytest.mark.slow
def test_two_ranks_agree_with_one(two_ranks: tuple[TrainJob, Rows], reference: Reference) -> None:
    """They see the images of one rank, and give its losses and EMA weights."""
    assert_close(*two_ranks, reference)


@pytest.mark.slow
def test_another_number_of_ranks(tmp_path: Path, two_ranks: tuple[TrainJob, Rows]) -> None:
    """One rank goes on from two ranks' checkpoint at stage 0; at stage 3 an error says why not."""
    shutil.copytree(two_ranks[0].checkpoint_path, tmp_path / "checkpoints")
    config = replace(two_ranks[0].config, total_images=128)
    job = make_job(tmp_path, config=config)

    if config.zero_stage == 0:
        assert run(job)[0]["resumed_from_images"] == 96
    else:
        with pytest.raises(ValueError, match="written by 2 ranks at zero_stage 3"):
            run(job)


if __name__ == "__main__":
    path, stage = Path(sys.argv[1]), int(sys.argv[2])
    job_of_rank = make_job(path, config=replace(CONFIG, zero_stage=stage))
    print(json.dumps(run(job_of_rank)[1]))
