"""Tests of folders that a bucket's stages have published, as this machine reads them."""

import shutil
from pathlib import Path

import pytest

from pipelines import stage as stage_module
from pipelines.stage import Outcome, Unit, keep_folders_in
from pipelines.store.ledger import Ledger


def test_copies_lie_where_they_are_cleared(
    s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the scratch of the run, as a process may be killed; made anew once that is cleared."""
    monkeypatch.setattr(stage_module, "_place_of_folders", None)
    monkeypatch.setenv("EDIFFI_CACHE", str(tmp_path / "cache"))
    record = Ledger.open(s3_store).stage("first", "f0")
    record.open({}, {})
    scratch = tmp_path / "scratch"
    (scratch / "clip").mkdir(parents=True)
    (scratch / "clip" / "config.json").write_text("{}")
    outcome = Outcome(files=["clip/config.json"], num_in=1, num_out=1)
    record.publish(Unit(id="a"), outcome, scratch, seconds=1.0, attempt=1)
    manifest = record.complete("first", {}, {}, {}, ["a"], "run-1")

    place = tmp_path / "of the run"
    keep_folders_in(place)
    for _ in range(2):
        folder = manifest.local_folder("clip")
        assert folder.is_relative_to(place)
        assert (folder / "config.json").read_text() == "{}"
        assert manifest.local_folder("clip") == folder
        shutil.rmtree(place)
