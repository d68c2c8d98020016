"""Power-function averages against explicit sums over a history of weights."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from ediffi.power_ema import (
    LARGEST_STD,
    PowerRecord,
    Profile,
    StoredAverage,
    combination,
    decay,
    gamma_of,
    reconstruct,
)
from ediffi.snapshot import SnapshotError, file_sha256

NUM_STEPS = 400
BATCH = 10
HISTORY = np.cumsum(  # weights after each step: they wander fast first and slowly later
    np.random.default_rng(0).standard_normal((NUM_STEPS, 64))
    / np.sqrt(np.arange(1, NUM_STEPS + 1))[:, None],
    axis=0,
)


def profile(std: float, num_steps: int, images_before: int = 0) -> NDArray[np.float64]:
    """What each step's weights count: the integral of the power profile over that step."""
    edges = images_before + BATCH * np.arange(num_steps + 1)
    return np.diff((edges / edges[-1]) ** (gamma_of(std) + 1))


def true_average(std: float, num_steps: int) -> NDArray[np.float64]:
    """The average as an explicit weighted sum."""
    return profile(std, num_steps) @ HISTORY[:num_steps]


def stored(directory: Path, every_steps: int, stds: tuple[float, ...] = (0.05, 0.1)) -> PowerRecord:
    """Write the tracked averages of `HISTORY` at regular times."""
    directory.mkdir(parents=True)
    averages = []
    for num_steps, std in itertools.product(
        range(every_steps, NUM_STEPS + 1, every_steps), sorted(stds)
    ):
        name = f"{num_steps}-{std}.safetensors"
        weights = torch.from_numpy(true_average(std, num_steps)).float()
        save_file({"weight": weights, "count": torch.tensor(num_steps)}, directory / name)
        sha256 = file_sha256(directory / name)
        averages.append(StoredAverage(images=num_steps * BATCH, std=std, file=name, sha256=sha256))
    record = PowerRecord(averages=tuple(averages))
    record.write(directory)
    return record


def error(directory: Path, record: PowerRecord, std: float, num_steps: int) -> float:
    """Relative difference between a reconstruction and the true average."""
    made = reconstruct(directory, record, std=std, images=num_steps * BATCH)
    true = true_average(std, num_steps)
    return float(np.linalg.norm(made.state["weight"].numpy() - true) / np.linalg.norm(true))


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_the_profile_has_the_width_that_was_asked_for(std: float) -> None:
    """Mean and variance of t^gamma, summed numerically, give back the relative width."""
    weights, middles = profile(std, 100_000), (np.arange(100_000) + 0.5) / 100_000
    mean = weights @ middles
    assert weights.sum() == pytest.approx(1)
    assert math.sqrt(weights @ (middles - mean) ** 2) == pytest.approx(std, rel=1e-5)


def test_the_known_widths_have_the_known_powers() -> None:
    """EDM2 gives 16.97 and 6.94 for the widths it tracks."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=5e-3)


@pytest.mark.parametrize("std", [0.0, LARGEST_STD, math.nan])
def test_impossible_widths_are_refused(std: float) -> None:
    """A profile that rises from the start cannot be wider than the plain mean."""
    with pytest.raises(ValueError, match=r"between 0 and 0\.2887"):
        gamma_of(std)


@pytest.mark.parametrize("images_before", [0, 250])
def test_decays_telescope_to_the_integral_of_the_profile(images_before: int) -> None:
    """A step's weights count what its own share and all later decays leave of them."""
    found = np.zeros(0)
    for step in range(1, 51):
        kept = decay(gamma_of(0.1), images_before + step * BATCH, BATCH)
        found = np.append(found * kept, 1 - kept)
    assert found == pytest.approx(profile(0.1, 50, images_before), rel=1e-9)


def test_inner_products_are_exact() -> None:
    """Two profiles of different power and end are as close as a fine sum says."""
    a, b = Profile(3.2, 800.0), Profile(11.0, 500.0)
    (coefficient,), left = combination([a], b)
    # one coefficient, which must be 1: what is left is the distance of the two profiles
    t = (np.arange(1_000_000) + 0.5) * 800 / 1_000_000
    p_a = (a.gamma + 1) * t**a.gamma / a.end_images ** (a.gamma + 1)
    p_b = np.where(t < 500, (b.gamma + 1) * t**b.gamma / b.end_images ** (b.gamma + 1), 0)
    assert coefficient == pytest.approx(1)
    assert left == pytest.approx(np.linalg.norm(p_a - p_b) / np.linalg.norm(p_b), rel=1e-4)


def test_coefficients_add_up_to_one() -> None:
    """What the weights have in common over time is kept, however few averages there are."""
    ends = [1e9, 2e9, 3e9]  # powers of images would overflow: 2e9^40
    profiles = [Profile(gamma_of(std), end) for end in ends for std in (0.01, 0.05)]
    for std in (0.02, 0.04, 0.08):
        coefficients, left = combination(profiles, Profile(gamma_of(std), 3e9))
        assert coefficients.sum() == pytest.approx(1, abs=1e-9)
        assert 0 < left < 1


@pytest.mark.parametrize("std", [0.04, 0.075, 0.12, 0.15])
def test_reconstruction_nears_the_true_average_with_more_snapshots(
    tmp_path: Path, std: float
) -> None:
    """From 20 stored times the error is below 1e-3; it falls with every doubling."""
    errors = []
    for every_steps in (80, 40, 20):
        directory = tmp_path / str(every_steps)
        errors.append(error(directory, stored(directory, every_steps), std, NUM_STEPS))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3


def test_reconstruction_at_an_earlier_time(tmp_path: Path) -> None:
    """An average that ended halfway knows nothing of what came later."""
    record = stored(tmp_path / "a", 20)
    assert error(tmp_path / "a", record, 0.08, NUM_STEPS // 2) < 1e-3


def test_a_tracked_width_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """It is the stored file itself, integers included."""
    record = stored(tmp_path / "a", 100)
    made = reconstruct(tmp_path / "a", record, std=0.1, images=300 * BATCH)
    assert torch.equal(made.state["weight"], torch.from_numpy(true_average(0.1, 300)).float())
    assert made.state["count"].item() == 300
    assert (made.num_stored, made.profile_error) == (1, 0.0)


def test_a_time_without_averages_is_refused(tmp_path: Path) -> None:
    """The error lists the times there are."""
    record = stored(tmp_path / "a", 200)
    with pytest.raises(ValueError, match="at 2001 images: choose one of 2000, 4000"):
        reconstruct(tmp_path / "a", record, std=0.08, images=2001)


def test_an_altered_file_is_refused(tmp_path: Path) -> None:
    """Every file is checked against its digest before it is used."""
    record = stored(tmp_path / "a", 200)
    path = tmp_path / "a" / record.averages[0].file
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(SnapshotError, match=path.name):
        reconstruct(tmp_path / "a", record, std=0.08, images=4000)


def test_the_record_survives_json_and_names_itself_when_damaged(tmp_path: Path) -> None:
    """What is written is read back; a missing field is an error that names the file."""
    record = stored(tmp_path / "a", 200)
    path = tmp_path / "a" / "power_ema.json"
    assert PowerRecord.read(path.parent) == record
    path.write_text(path.read_text().replace("images_before", "images_bfore"))
    with pytest.raises(SnapshotError, match=r"power_ema.json: field 'images_before' is missing"):
        PowerRecord.read(path.parent)
