"""Tests of `ediffi ema`: a new snapshot out of stored averages, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ediffi.conditioning import StreamConfig
from ediffi.network import build_network
from ediffi.noise import SigmaDistribution
from ediffi.power_ema import PowerRecord, StoredAverage
from ediffi.preconditioning import Preconditioning
from ediffi.snapshot import Snapshot, file_sha256, load_snapshot, save_snapshot
from ediffi.unet import UNetConfig
from pipelines.cli import main

NETWORK = UNetConfig(
    image_px=8,
    widths=(8,),
    num_blocks=1,
    head_width=8,
    context_width=8,
    embedding_width=8,
    streams=(StreamConfig(name="clip_image", pooled_width=4),),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot with two widths stored at two times; the weights are constants by file."""
    directory = tmp_path_factory.mktemp("unit") / "base"
    state = build_network(NETWORK).state_dict()
    snapshot = Snapshot(
        network=NETWORK,
        preconditioning=Preconditioning(),
        distribution=SigmaDistribution(),
        images_seen=2000,
    )
    save_snapshot(directory, snapshot, state)
    folder = directory / "power_ema"
    folder.mkdir()
    averages = []
    for number, (images, std) in enumerate(((1000, 0.05), (1000, 0.1), (2000, 0.05), (2000, 0.1))):
        name = f"images-{images:010d}-std-{std}.safetensors"
        save_file({k: torch.full_like(v, number) for k, v in state.items()}, folder / name)
        sha256 = file_sha256(folder / name)
        averages.append(StoredAverage(images=images, std=std, file=name, sha256=sha256))
    PowerRecord(averages=tuple(averages)).write(folder)
    return directory


def constant(directory: Path) -> float:
    """The one value that all weights of a snapshot have."""
    values = torch.cat([w.flatten() for w in load_snapshot(directory)[1].network.parameters()])
    assert (values == values[0]).all()
    return values[0].item()


def test_a_tracked_width_becomes_a_snapshot(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At an earlier time too; the new record says how far training was then."""
    words = ["ema", str(source), "--std", "0.1", "--images", "1000", "--output", str(tmp_path)]
    assert main([*words, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["images"], row["num_stored"], row["profile_error"]) == (1000, 1, 0.0)
    assert constant(tmp_path) == 1.0
    assert load_snapshot(tmp_path)[0].images_seen == 1000


def test_another_width_is_made_of_all_that_is_stored(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last time is the default; a rough fit is said aloud."""
    assert main(["ema", str(source), "--std", "0.07", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "width 0.07 at 2,000 images, of 4 stored averages" in out
    assert "that is rough: a smaller ema_snapshot_images" not in out
    assert 2.0 < constant(tmp_path) < 3.0
    assert main(["ema", str(source), "--std", "0.2", "--output", str(tmp_path)]) == 0
    assert "that is rough: a smaller ema_snapshot_images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--std", "0.3"], "std must lie between 0 and 0.2887, got 0.3"),
        (["--std", "0.07", "--images", "1500"], "at 1500 images: choose one of 1000, 2000"),
    ],
)
def test_width_and_time_that_cannot_be_had_end_with_2(
    tmp_path: Path, source: Path, options: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    """The message says what can be had; nothing is written."""
    output = tmp_path / "new"
    assert main(["ema", str(source), *options, "--output", str(output)]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_a_snapshot_without_stored_averages_is_told_how_to_have_them(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the settings; so does the one for a folder that is no snapshot."""
    plain = tmp_path / "plain"
    shutil.copytree(source, plain, ignore=shutil.ignore_patterns("power_ema"))
    words = ["--std", "0.07", "--output", str(tmp_path / "new")]
    assert main(["ema", str(plain), *words]) == 2
    assert "train with ema_profile: power" in capsys.readouterr().err
    assert main(["ema", str(tmp_path), *words]) == 2
    assert "snapshot.json is missing" in capsys.readouterr().err


def test_a_snapshot_is_not_written_over_itself(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The source would vanish while it is read."""
    assert main(["ema", str(source), "--std", "0.07", "--output", str(source)]) == 2
    assert "--output must be another directory" in capsys.readouterr().err
