"""Tests of pipelines.durable: what outlives an attempt, in a directory and in a bucket."""

from pathlib import Path

import pytest

from pipelines import durable as module
from pipelines.durable import Durable, read_progress
from pipelines.location import Location, location


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


def test_a_checkpoint_without_its_mark_is_invisible(
    s3_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that dies while it copies leaves files in the bucket, but no complete checkpoint."""
    place = location(s3_store) / "durable" / "base"
    one = Durable(place)
    checkpoint(one.path, "images-100", "w")
    put = place.fs.put_file

    def dies_at_the_mark(source: str, target: str) -> None:
        if target.endswith("complete.json"):
            raise KeyboardInterrupt
        put(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(place.fs, "put_file", dies_at_the_mark)
        with pytest.raises(KeyboardInterrupt):
            one.report({"images": 100})
    folder = place / "checkpoints" / "images-100"
    assert sorted(path.name for path in folder.iterdir()) == ["weights"]


def test_progress_reaches_a_bucket_now_and_then(
    s3_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver reads it from there; a row does not cost a request each time."""
    place = location(s3_store) / "durable" / "base"
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with Durable(place) as one:
        for images in (1, 2, 3):
            one.report({"images": images})
        assert [row["images"] for row in read_progress(place)] == [1]
        clock[0] += module.PUSH_S
        one.report({"images": 4})
        assert [row["images"] for row in read_progress(place)] == [1, 2, 3, 4]
