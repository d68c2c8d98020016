"""Resuming: bit by bit on as many ranks, within rounding on another number, at every ZeRO stage."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ediffi.train.loop import Stopped, TrainJob, train
from tests.ediffi.train.toy import CONFIG, Killed, Rows, after, make_job, run, run_ranks, weights

# DeepSpeed 0.19 at stage 3 calls what torch 2.14 renames.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning")

NUM_BATCHES = CONFIG.final_images // CONFIG.batch_images


def assert_equal(job: TrainJob, expected: TrainJob) -> None:
    """Both results hold the same bits."""
    for name, weight in weights(expected).items():
        assert torch.equal(weights(job)[name], weight), name


def assert_close(job: TrainJob, rows: Rows, reference: tuple[TrainJob, Rows]) -> None:
    """Every number reported and every EMA weight is the reference's, up to float32 rounding."""
    expected_job, expected_rows = reference
    expected_rows = expected_rows[-len(rows) :]
    for found, row in zip(rows, expected_rows, strict=True):
        assert found == pytest.approx(row, abs=1e-5, rel=1e-5)
    found_weights = weights(job)
    for name, weight in weights(expected_job).items():
        torch.testing.assert_close(found_weights[name], weight, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainJob, Rows]:
    """An undisturbed run of `CONFIG`, and its rows."""
    job = make_job(tmp_path_factory.mktemp("reference"))
    return job, run(job)[1]


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_zero_stages_agree(
    tmp_path: Path, reference: tuple[TrainJob, Rows], zero_stage: int
) -> None:
    """Stages 1 to 3 give the losses, gradient norms and EMA weights of stage 0 to 1e-5."""
    sharded = make_job(tmp_path, config=replace(CONFIG, zero_stage=zero_stage))

    assert_close(sharded, run(sharded)[1], reference)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_killed_at_random_images_equals_undisturbed_bit_by_bit(
    tmp_path: Path, zero_stage: int
) -> None:
    """Ended three times after random batches, a run gives the losses and weights of one piece."""
    config = replace(CONFIG, zero_stage=zero_stage, log_images=16, checkpoint_images=32)
    whole = make_job(tmp_path / "whole", config=config)
    _, expected = run(whole)
    pieces = make_job(tmp_path / "pieces", config=config)
    generator = random.Random(zero_stage)

    for _ in range(3):
        with pytest.raises(Killed):
            train(pieces, lambda row: None, after(generator.randint(1, 2), Killed))
    summary, resumed = run(pieces)

    assert resumed == [row for row in expected if row["images"] > summary["resumed_from_images"]]
    assert_equal(pieces, whole)


def test_kill_inside_a_stretch_of_the_loss_leaves_its_mean_alone(tmp_path: Path) -> None:
    """A checkpoint between two rows carries what the loss has summed up so far."""
    config = replace(CONFIG, log_images=48, checkpoint_images=32)
    whole = make_job(tmp_path / "whole", config=config)
    _, expected = run(whole)
    pieces = make_job(tmp_path / "pieces", config=config)

    with pytest.raises(Killed):
        train(pieces, lambda row: None, after(3, Killed))
    summary, resumed = run(pieces)

    assert summary["resumed_from_images"] == 32
    assert resumed == expected


def test_sigterm_saves_and_leaves_and_the_rest_is_the_same(tmp_path: Path) -> None:
    """A signal during the third batch ends training after it, with a checkpoint right there."""
    whole = make_job(tmp_path / "whole")
    _, expected = run(whole)
    stopped = make_job(tmp_path / "stopped")

    def signals(row: dict[str, float]) -> None:
        if row["images"] == 48:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="after 48 images"):
        train(stopped, signals)
    assert signal.getsignal(signal.SIGTERM) is before
    summary, resumed = run(stopped)

    assert summary["resumed_from_images"] == 48
    assert resumed == [row for row in expected if row["images"] > 48]
    assert_equal(stopped, whole)


def test_a_wish_to_stop_after_the_last_batch_is_no_stop(tmp_path: Path) -> None:
    """The run is over anyway: it leaves its snapshot."""
    job = make_job(tmp_path)

    summary, _ = run(job, after(NUM_BATCHES))

    assert summary["images_seen"] == CONFIG.final_images


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_any_number_of_ranks_goes_on_from_any_other(
    tmp_path: Path, reference: tuple[TrainJob, Rows]
) -> None:
    """1 -> 2 and 2 -> 1 ranks in mid-training agree to 1e-5 at every stage; 2 -> 2 bit by bit."""
    stages = {stage: {"zero_stage": stage} for stage in range(4)}
    for stage, config in stages.items():
        job = make_job(tmp_path / f"one-{stage}", config=replace(CONFIG, **config))
        with pytest.raises(Stopped):
            run(job, after(3))
    plan = []
    for stage, config in stages.items():
        for name, stop_after in [("one", 0), ("two", 3), ("again", 3), ("again", 0), ("whole", 0)]:
            directory = str(tmp_path / f"{name}-{stage}")
            plan.append({"directory": directory, "config": config, "stop_after": stop_after})

    rows = iter(run_ranks(2, plan))

    for stage, config in stages.items():
        from_one, _, _, again, whole = (next(rows) for _ in range(5))
        jobs = {
            name: make_job(tmp_path / f"{name}-{stage}", config=replace(CONFIG, **config))
            for name in ("one", "two", "again", "whole")
        }
        assert_close(jobs["one"], from_one, reference)
        assert_close(jobs["two"], run(jobs["two"])[1], reference)
        assert_close(jobs["whole"], whole, reference)
        assert again == whole[-len(again) :]
        assert_equal(jobs["again"], jobs["whole"])
