"""What a run takes over from its parent: weights, moments, average; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ediffi.train import loop
from ediffi.train.checkpoint import CheckpointError, open_checkpoint
from ediffi.train.config import TrainConfig
from ediffi.train.job import TrainJob
from ediffi.train.start import STATE_FOLDER, Start, build_denoiser, publish_state
from tests.ediffi.train.toy import CONFIG, make_job, run, weights

pytestmark = pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning")

# Half of a run of 96 images: nothing in it depends on how long the run is.
HALF = replace(CONFIG, total_images=48, lr_schedule="constant", warmup_images=0)
POWER = replace(HALF, ema_profile="power", ema_half_life_images=0, ema_std=0.08)


def trained(directory: Path, config: TrainConfig) -> TrainJob:
    """Run a job and publish its state with its snapshot."""
    job = make_job(directory, config=config)
    run(job)
    publish_state(job.checkpoint_path, job.snapshot_path)
    return job


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """A finished run whose snapshot comes with its state."""
    return trained(tmp_path_factory.mktemp("parent"), HALF)


def child_of(job: TrainJob, **settings: Any) -> Start:
    """Start from a finished run that published its state."""
    return Start(snapshot=job.snapshot_path, state=job.snapshot_path / STATE_FOLDER, **settings)


def first_weights(job: TrainJob) -> dict[str, Tensor]:
    """Weights that a job begins with."""
    return dict(build_denoiser(job)[0].network.state_dict())


def state_of(job: TrainJob, images: int) -> Callable[[str, str], Tensor]:
    """Whole tensors of the job's checkpoint at `images`."""
    checkpoint = open_checkpoint(job.checkpoint_path / f"images-{images:010d}")
    sizes = {name: tensor.numel() for name, tensor in first_weights(job).items()}
    return lambda kind, name: checkpoint.read(kind, name, 0, sizes[name])


def test_random_weights_are_a_function_of_the_seed(tmp_path: Path) -> None:
    """Without a parent, equal seeds give equal weights and other seeds other ones."""
    job = make_job(tmp_path)
    other = make_job(tmp_path, config=replace(CONFIG, seed=6))
    found, again, different = (first_weights(one) for one in (job, job, other))
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert any(not torch.equal(found[name], different[name]) for name in found)


def test_a_child_begins_with_the_average_or_the_raw_weights(
    tmp_path: Path, parent: TrainJob
) -> None:
    """By default the parent's snapshot; "raw" is what its last step left, which differs."""
    averaged = first_weights(make_job(tmp_path, start=Start(snapshot=parent.snapshot_path)))
    raw = first_weights(make_job(tmp_path, start=child_of(parent, weights="raw")))
    read = state_of(parent, 48)
    assert all(torch.equal(averaged[name], one) for name, one in weights(parent).items())
    assert all(torch.equal(raw[name].flatten(), read("weights", name)) for name in raw)
    assert any(not torch.equal(raw[name], averaged[name]) for name in raw)


@pytest.mark.parametrize(
    ("config", "zero_stage"),
    [(HALF, 0), (POWER, 3)],
    ids=["half_life-0", "power-3"],
)
def test_inheriting_everything_continues_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: TrainConfig, zero_stage: int
) -> None:
    """Two halves equal one whole run in weights, moments, averages and result.

    A child counts its images from 0, so it would see the parent's first samples again under the
    same seed; here it is shown the samples that the whole run sees next. The learning rate is
    constant. Then nothing distinguishes the two.
    """
    config = replace(config, zero_stage=zero_stage)
    whole = make_job(tmp_path / "whole", config=replace(config, total_images=96))
    run(whole)
    half = trained(tmp_path / "half", config)

    def load_next(examples: Any, config: TrainConfig, worker: Any, start_images: int) -> Any:
        longer = replace(config, total_images=96)
        return load(examples, longer, worker, start_images + 48)

    load = loop.load_batches
    monkeypatch.setattr(loop, "load_batches", load_next)
    start = child_of(half, weights="raw", optimizer="inherit", ema="inherit", images_before=48)
    child = make_job(tmp_path / "child", config=config, start=start)
    run(child)

    expected, found = state_of(whole, 96), state_of(child, 48)
    final = open_checkpoint(child.checkpoint_path / "images-0000000048")
    assert final.progress.num_steps == 6
    for name, weight in weights(whole).items():
        assert torch.equal(weights(child)[name], weight), name
        for kind in final.kinds:
            assert torch.equal(found(kind, name), expected(kind, name)), (kind, name)


def test_averaged_weights_may_go_with_inherited_moments(tmp_path: Path, parent: TrainJob) -> None:
    """Weights come from the snapshot, moments and the number of steps from the state."""
    config = replace(HALF, lr=1e-12, weight_decay=0.0)
    start = child_of(parent, optimizer="inherit")
    child = make_job(tmp_path, config=config, start=start)
    run(child)
    for name, weight in weights(parent).items():
        torch.testing.assert_close(weights(child)[name], weight, atol=1e-8, rtol=0)
    final = open_checkpoint(child.checkpoint_path / "images-0000000048")
    assert final.progress.num_steps == 6


def test_a_fresh_optimizer_and_a_restarted_average_remember_nothing(
    tmp_path: Path, parent: TrainJob
) -> None:
    """By default the child counts steps from zero and its average forgets as a young one does."""
    child = make_job(tmp_path, config=HALF, start=Start(snapshot=parent.snapshot_path))
    run(child)
    final = open_checkpoint(child.checkpoint_path / "images-0000000048")
    assert final.progress.num_steps == 3


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"weights": "raw"}, "start.state must name the last checkpoint"),
        ({"optimizer": "inherit"}, "start.state must name the last checkpoint"),
        ({"ema": "inherit"}, "start.images_before must be positive"),
        ({"images_before": 3}, "and 0 where it restarts, got 3"),
        ({"weights": "rwa"}, "start.weights must be one of ema, raw: 'rwa'"),
    ],
)
def test_a_start_that_cannot_be_made_is_refused(settings: dict[str, Any], answer: str) -> None:
    """What the snapshot alone cannot give must be named, and the age of an average said."""
    with pytest.raises(ValueError, match=answer):
        Start(snapshot=Path("parent"), **settings)


def test_an_average_of_another_kind_cannot_be_carried_on(tmp_path: Path, parent: TrainJob) -> None:
    """A power average needs the parent's; the error says what to change."""
    start = Start(snapshot=parent.snapshot_path, ema="inherit", images_before=48)
    with pytest.raises(ValueError, match="set ema_profile of the parent to power"):
        run(make_job(tmp_path, config=POWER, start=start))


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    """The parent's state is verified like any checkpoint."""
    job = trained(tmp_path / "parent", HALF)
    path = job.snapshot_path / STATE_FOLDER / "rank-00000.safetensors"
    data = path.read_bytes()
    path.unlink()  # it may be another name of the checkpoint's own file
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors is altered"):
        build_denoiser(make_job(tmp_path / "child", start=child_of(job, weights="raw")))


def test_a_run_without_a_checkpoint_has_no_state_to_publish(tmp_path: Path) -> None:
    """The error names the folder that was searched."""
    with pytest.raises(FileNotFoundError, match="no complete checkpoint in"):
        publish_state(tmp_path / "checkpoints", tmp_path / "snapshot")


def test_publishing_state_twice_leaves_one(tmp_path: Path, parent: TrainJob) -> None:
    """A unit that is done again replaces what an earlier attempt had linked."""
    for _ in range(2):
        publish_state(parent.checkpoint_path, tmp_path)
    names = sorted(path.name for path in (tmp_path / STATE_FOLDER).iterdir())
    assert names == ["complete.json", "rank-00000.safetensors"]
    assert open_checkpoint(tmp_path / STATE_FOLDER).progress.images_seen == 48
