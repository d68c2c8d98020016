"""Tests of pipelines.worker.durable: what outlives an attempt, in a directory and in a bucket."""

import shutil
import tempfile
import threading
import time
from pathlib import Path

import pytest

from pipelines.store.location import Location, location
from pipelines.worker import durable as module
from pipelines.worker.durable import Durable, grids_in, read_progress, read_reports


@pytest.fixture(params=["directory", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A unit's durable folder."""
    if request.param == "directory":
        return location(tmp_path / "durable" / "base")
    return location(request.getfixturevalue("s3_store")) / "durable" / "base"


def checkpoint(folder: Path, name: str, text: str) -> None:
    """Write a checkpoint as training does: its mark last."""
    (folder / "checkpoints" / name).mkdir(parents=True)
    (folder / "checkpoints" / name / "weights").write_text(text)
    (folder / "checkpoints" / name / "complete.json").write_text("{}")


def test_the_next_attempt_finds_checkpoints_and_progress(place: Location) -> None:
    """On another machine too, where the store is a bucket."""
    with Durable(place) as first:
        checkpoint(first.path, "images-100", "w")
        first.report({"images": 100, "loss": 0.5})
    with Durable(place) as second:
        assert (second.path / "checkpoints" / "images-100" / "weights").read_text() == "w"
        second.report({"images": 200, "loss": 0.25})
    assert [row["images"] for row in read_progress(place)] == [100, 200]


def test_what_is_removed_is_removed_from_the_store(place: Location) -> None:
    """Old checkpoints are dropped by policy; the store follows."""
    with Durable(place) as one:
        checkpoint(one.path, "images-100", "w")
        one.report({"images": 100})
    with Durable(place) as one:
        for path in sorted((one.path / "checkpoints" / "images-100").iterdir()):
            path.unlink()
        (one.path / "checkpoints" / "images-100").rmdir()
        checkpoint(one.path, "images-200", "w")
    assert not (place / "checkpoints" / "images-100" / "complete.json").exists()
    assert (place / "checkpoints" / "images-200" / "complete.json").exists()


def bucket_of(s3_store: str) -> Location:
    """A unit's durable folder in a bucket."""
    return location(s3_store) / "durable" / "base"


def names(place: Location) -> list[str]:
    """What lies in the bucket below a place."""
    found = place.fs.find(place.path)
    return sorted(path.removeprefix(f"{place.path}/") for path in found)


def test_a_checkpoint_without_its_mark_is_invisible(
    s3_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that dies while it copies leaves files in the bucket, but no complete checkpoint."""
    place = bucket_of(s3_store)
    one = Durable(place)
    checkpoint(one.path, "images-100", "w")
    put = place.fs.put_file

    def dies_at_the_mark(source: str, target: str) -> None:
        if target.endswith("complete.json"):
            raise OSError("gone")
        put(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(place.fs, "put_file", dies_at_the_mark)
        with pytest.raises(OSError, match="gone"), one:
            one.report({"images": 100})
    assert names(place) == ["checkpoints/images-100/weights", "progress.jsonl"]


def test_what_is_half_written_stays_here(s3_store: str) -> None:
    """Checkpoints are written in the background: hidden folders and unmarked ones are not sent."""
    place = bucket_of(s3_store)
    with Durable(place) as one:
        checkpoint(one.path, "images-100", "w")
        checkpoint(one.path, ".partial-200-a", "w")
        checkpoint(one.path, "images-300", "w")
        (one.path / "checkpoints" / "images-300" / "complete.json").unlink()
        checkpoint(one.path / "levels" / "E1_1", "images-50", "w")
        (one.path / "grids").mkdir()
        (one.path / "grids" / "images-100.png").write_text("png")
        (one.path / "grids" / ".images-200.png").write_text("pn")
    assert names(place) == [
        "checkpoints/images-100/complete.json",
        "checkpoints/images-100/weights",
        "grids/images-100.png",
        "levels/E1_1/checkpoints/images-50/complete.json",
        "levels/E1_1/checkpoints/images-50/weights",
    ]


def test_a_checkpoint_that_is_retired_while_it_is_copied_leaves_no_mark(
    s3_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bucket gets some of its files, never a mark; the next copy takes them away."""
    place = bucket_of(s3_store)
    one = Durable(place)
    checkpoint(one.path, "images-100", "w")
    (one.path / "checkpoints" / "images-100" / "averages").write_text("a")
    put = place.fs.put_file

    def retires_midway(source: str, target: str) -> None:
        put(source, target)
        shutil.rmtree(one.path / "checkpoints" / "images-100", ignore_errors=True)

    with monkeypatch.context() as patch:
        patch.setattr(place.fs, "put_file", retires_midway)
        module._Copier(one.path, place).copy()
    assert names(place) == ["checkpoints/images-100/averages"]
    with one:
        one.report({"images": 200})
    assert names(place) == ["progress.jsonl"]


def test_reporting_does_not_wait_for_a_bucket(
    s3_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies are made by a thread, now and then; the driver reads the rows from there."""
    place = bucket_of(s3_store)
    put, gate, puts = place.fs.put_file, threading.Event(), []

    def slow(source: str, target: str) -> None:
        puts.append(target)
        assert gate.wait(20)
        put(source, target)

    monkeypatch.setattr(place.fs, "put_file", slow)
    with Durable(place) as one:
        for images in range(100):
            one.report({"images": images})  # would wait for ever
        assert len(puts) <= 1
        gate.set()
    assert len(puts) <= 2
    assert [row["images"] for row in read_progress(place)] == list(range(100))


def test_a_copy_that_failed_is_told(s3_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training on would only lose more: the next row raises what the bucket said."""
    place = bucket_of(s3_store)
    one = Durable(place)
    failed = threading.Event()

    def fails(source: str, target: str) -> None:
        failed.set()
        raise OSError("access denied")

    monkeypatch.setattr(place.fs, "put_file", fails)
    one.report({"images": 1})
    assert failed.wait(20)
    time.sleep(0.5)  # the thread is about to keep what was raised
    with pytest.raises(OSError, match="access denied"):
        one.report({"images": 2})


def test_notices_are_kept_apart_and_told_once(place: Location) -> None:
    """A resumed attempt says again what it said; rows are metrics alone."""
    for images in (100, 50, 200):
        with Durable(place) as one:
            one.notice("a spike at 60 images")
            one.report({"images": images, "loss": 1.0})
    reports = read_reports(place)
    assert reports.notices == ["a spike at 60 images"]
    assert [row["images"] for row in reports.rows] == [50, 200]


def test_a_chain_of_runs_is_one_curve(place: Location) -> None:
    """Runs after one another whose images go on counting; the second is resumed midway."""
    with Durable(place) as one:
        for images in (10, 20, 30, 40, 50):
            one.report({"images": images, "loss": 1.0})
    with Durable(place) as one:
        for images in (40, 50, 60):
            one.report({"images": images, "loss": 2.0})
    rows = read_progress(place)
    assert [row["images"] for row in rows] == [10, 20, 30, 40, 50, 60]
    assert [row["loss"] for row in rows] == [1, 1, 1, 2, 2, 2]


def test_grids_are_found_in_order(place: Location) -> None:
    """By images seen, which their names begin with; what is being written is not seen."""
    with Durable(place) as one:
        level = one.path / "levels" / "E1_1" / "grids"
        for folder in (one.path / "grids", level):
            folder.mkdir(parents=True)
        for name in ("images-0000000200.png", "images-0000000100.png", ".x.png", "notes.txt"):
            (one.path / "grids" / name).write_text("x")
        (level / "images-0000000050.png").write_text("x")
    found = grids_in(place)
    assert list(found) == [
        "images-0000000100.png",
        "images-0000000200.png",
        "E1_1/images-0000000050.png",
    ]
    assert all(path.read_text() == "x" for path in found.values())
    assert grids_in(place / "nothing") == {}


def test_a_folder_that_was_cleared_away_takes_nothing_from_the_store(
    s3_store: str, tmp_path: Path
) -> None:
    """Another driver took the run for over: the worker's checkpoints in the bucket stay."""
    place = bucket_of(s3_store)
    one = Durable(place, new_folder=lambda: Path(tempfile.mkdtemp(dir=tmp_path)))
    assert one.path.parent == tmp_path
    checkpoint(one.path, "images-100", "w")
    assert one._copier is not None
    one._copier.copy()
    shutil.rmtree(one.path)
    with pytest.raises(FileNotFoundError, match=r"what was copied to .* before stays"):
        one.__exit__()
    assert "checkpoints/images-100/complete.json" in names(place)
