"""The training loop end to end, on a toy data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ediffi.loss import denoising_loss
from ediffi.noise import NoiseInterval, SigmaDistribution, tree_node
from ediffi.snapshot import load_snapshot
from ediffi.train import loop
from ediffi.train.start import Start
from tests.ediffi.train.toy import CONFIG, NETWORK, STREAMS, Rows, make_job, run, weights

# DeepSpeed 0.19 at stage 3 calls what torch 2.14 renames.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning")


def losses(rows: Rows) -> list[float]:
    """Loss of every row."""
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[loop.TrainJob, Rows]:
    """An undisturbed run of `CONFIG`, and its rows."""
    job = make_job(tmp_path_factory.mktemp("reference"))
    return job, run(job)[1]


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


def test_micro_batches_do_not_change_the_losses(
    tmp_path: Path, reference: tuple[loop.TrainJob, Rows]
) -> None:
    """Two micro-batches of 8 give what one pass over the batch of 16 gives."""
    whole = make_job(tmp_path, config=replace(CONFIG, micro_batch_images=16))

    assert losses(run(whole)[1]) == pytest.approx(losses(reference[1]), abs=1e-5)


def test_bf16_keeps_float32_weights_and_stays_near_fp32(
    tmp_path: Path, reference: tuple[loop.TrainJob, Rows]
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


def test_expert_starts_from_its_parents_average(
    tmp_path: Path, reference: tuple[loop.TrainJob, Rows]
) -> None:
    """With a learning rate of next to nothing the expert's result is its parent's snapshot."""
    base = reference[0]
    expert = make_job(
        tmp_path, start=Start(snapshot=base.snapshot_path), config=replace(CONFIG, lr=1e-12)
    )

    run(expert)

    for name, weight in weights(base).items():
        torch.testing.assert_close(weights(expert)[name], weight, atol=1e-8, rtol=0)


def test_expert_refuses_a_parent_of_another_architecture(
    tmp_path: Path, reference: tuple[loop.TrainJob, Rows]
) -> None:
    """The error names the field that differs, with both values; dropout may differ."""
    base = reference[0]
    other_dropout = tuple(replace(stream, dropout=0.0) for stream in STREAMS)
    network = replace(NETWORK, streams=other_dropout)
    loop.build_denoiser(
        make_job(tmp_path / "a", start=Start(snapshot=base.snapshot_path), network=network)
    )

    network = replace(NETWORK, embedding_width=32)
    with pytest.raises(ValueError, match="embedding_width must be 16 as in the parent, got 32"):
        loop.build_denoiser(
            make_job(tmp_path / "b", start=Start(snapshot=base.snapshot_path), network=network)
        )
