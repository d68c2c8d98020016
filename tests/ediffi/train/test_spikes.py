"""What training does when a gradient is not finite, or far larger than usual."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ediffi.loss import denoising_loss
from ediffi.noise import WHOLE
from ediffi.train import guard, loop
from ediffi.train.loop import TrainingDiverged, TrainJob, train
from tests.ediffi.train.toy import CONFIG, Killed, Rows, after, make_job, run, weights

# DeepSpeed 0.19 at stage 3 calls what torch 2.14 renames.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning")

ONE_PASS = replace(CONFIG, micro_batch_images=16, checkpoint_images=32, log_images=16)
Spoil = Callable[[int, float], None]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """Make the loss of the batch that begins with a given noise draw `factor` times as large."""
    bad: dict[float, float] = {}

    def loss(denoiser: Any, images: Any, sigma_B: torch.Tensor, *rest: Any) -> torch.Tensor:
        factor = bad.get(sigma_B[0].item(), 1.0)
        return denoising_loss(denoiser, images, sigma_B, *rest) * factor

    def spoil(batch_index: int, factor: float) -> None:
        from ediffi.train.data import draw

        u = draw(CONFIG.seed, batch_index * CONFIG.batch_images, (), 0).u
        distribution = make_job(Path("/nowhere"), shards=()).distribution
        sigma = distribution.sigma_at(torch.tensor([u], dtype=torch.float64), WHOLE)
        bad[sigma.item()] = factor

    monkeypatch.setattr(loop, "denoising_loss", loss)
    return spoil


def norms(rows: Rows) -> list[float]:
    """Gradient norms of the steps that were taken."""
    return [row["grad_norm"] for row in rows if "grad_norm" in row]


def assert_equal(job: TrainJob, expected: TrainJob) -> None:
    """Both results hold the same bits."""
    for name, weight in weights(expected).items():
        assert torch.equal(weights(job)[name], weight), name


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_stop_is_an_error_that_tells_when_and_spoils_no_checkpoint(
    tmp_path: Path, spoil: Spoil, zero_stage: int
) -> None:
    """The policy of old: a loss that is not a number ends training at once."""
    spoil(3, math.nan)
    job = make_job(tmp_path, config=replace(ONE_PASS, zero_stage=zero_stage))

    with pytest.raises(TrainingDiverged, match="at 64 images"):
        run(job)

    assert [path.name for path in job.checkpoint_path.iterdir()] == ["images-0000000032"]


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_skip_loses_that_batch_alone_and_says_so(
    tmp_path: Path, spoil: Spoil, zero_stage: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Five of six steps are taken; the weights stay finite, the row and the log tell."""
    spoil(3, math.nan)
    job = make_job(tmp_path, config=replace(ONE_PASS, zero_stage=zero_stage, on_spike="skip"))

    summary, rows = run(job)

    assert summary["num_spikes"] == 1
    assert [row["num_spikes"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert len(norms(rows)) == 5
    assert all(weight.isfinite().all() for weight in weights(job).values())
    assert "at 64 images: the batch is skipped (1 of at most 10 times)" in caplog.text


def test_a_spike_is_far_above_the_running_norm(
    tmp_path: Path, spoil: Spoil, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a factor, a finite gradient a thousand times too large is refused as well."""
    monkeypatch.setattr(guard, "WARMUP_STEPS", 2)
    spoil(3, 1000.0)
    tame = make_job(tmp_path / "tame", config=replace(ONE_PASS, on_spike="skip"))
    wary = make_job(tmp_path / "wary", config=replace(tame.config, spike_factor=10.0))

    assert run(tame)[0]["num_spikes"] == 0
    assert run(wary)[0]["num_spikes"] == 1


def test_rollback_takes_the_weights_of_the_last_checkpoint_and_goes_on(
    tmp_path: Path, spoil: Spoil
) -> None:
    """The fourth batch is bad: the third one's step is undone too, the fifth comes next."""
    spoil(3, math.nan)
    rolled = make_job(tmp_path / "rolled", config=replace(ONE_PASS, on_spike="rollback"))
    skipped = make_job(tmp_path / "skipped", config=replace(ONE_PASS, on_spike="skip"))

    _, rows = run(rolled)
    _, others = run(skipped)

    assert [row["images"] for row in rows] == [16, 32, 48, 64, 80, 96]
    assert norms(rows)[:3] == norms(others)[:3]
    assert norms(rows)[3:] != norms(others)[3:]


def test_lower_rate_halves_the_learning_rate_for_good(tmp_path: Path, spoil: Spoil) -> None:
    """Each refused step halves it once more."""
    spoil(2, math.nan)
    spoil(4, math.inf)
    config = replace(ONE_PASS, on_spike="lower_rate", lr_schedule="constant", warmup_images=0)

    _, rows = run(make_job(tmp_path, config=config))

    assert [row["lr"] / config.lr for row in rows] == [1, 1, 1, 0.5, 0.5, 0.25]


def test_more_spikes_than_allowed_stop(tmp_path: Path, spoil: Spoil) -> None:
    """`max_spikes` of 1 lets one pass; the second ends training and names the setting."""
    spoil(1, math.nan)
    spoil(2, math.nan)
    config = replace(ONE_PASS, on_spike="skip", max_spikes=1)

    with pytest.raises(TrainingDiverged, match=r"at 48 images.*train\.max_spikes allows 1"):
        run(make_job(tmp_path, config=config))


@pytest.mark.parametrize("policy", ["skip", "rollback", "lower_rate"])
def test_killed_after_a_spike_a_run_ends_as_undisturbed(
    tmp_path: Path, spoil: Spoil, policy: str
) -> None:
    """What was decided is decided again, or carried by the checkpoint: equal bits."""
    spoil(2, math.nan)
    config = replace(ONE_PASS, on_spike=policy)
    whole = make_job(tmp_path / "whole", config=config)
    _, expected = run(whole)

    for num_batches in (3, 2):
        pieces = make_job(tmp_path / f"pieces-{num_batches}", config=config)
        with pytest.raises(Killed):
            train(pieces, lambda row: None, after(num_batches, Killed))
        with pytest.raises(Killed):
            train(pieces, lambda row: None, after(2, Killed))
        summary, resumed = run(pieces)
        assert resumed == [r for r in expected if r["images"] > summary["resumed_from_images"]]
        assert_equal(pieces, whole)
