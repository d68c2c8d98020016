"""Tests of pipelines.store.location: the same operations on a directory and on a bucket."""

import errno
import os
from pathlib import Path

import pytest

from pipelines.store.location import (
    Location,
    create_exclusively,
    duplicate,
    is_remote,
    local_copy,
    location,
    publish,
    remove_tree,
    write_atomically,
)


@pytest.fixture(params=["directory", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A place in a directory, then one on the S3 server."""
    if request.param == "directory":
        return location(tmp_path / "store")
    return location(request.getfixturevalue("s3_store"))


def test_local_addresses_are_absolute_paths(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file:// URL, a relative path and an absolute one name the same place."""
    monkeypatch.chdir(tmp_path)
    assert location("store") == location(f"file://{tmp_path}/store") == tmp_path / "store"
    assert not is_remote(location("store"))


def test_a_url_is_another_kind_of_place() -> None:
    """It keeps its address, has the parts of a path, and travels to other processes as text."""
    place = location("s3://bucket/prefix/")
    assert is_remote(place)
    assert str(place / "a" / "b.tar") == "s3://bucket/prefix/a/b.tar"
    assert location(str(place / "a")) == place / "a"


def test_text_is_replaced(place: Location) -> None:
    """The newer text is read at once: no listing or content is remembered."""
    write_atomically(place / "deep" / "run.json", "old")
    assert (place / "deep" / "run.json").read_text() == "old"
    write_atomically(place / "deep" / "run.json", "newer")
    assert (place / "deep" / "run.json").read_text() == "newer"
    assert [path.name for path in (place / "deep").iterdir()] == ["run.json"]


def test_a_failed_write_leaves_nothing_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full at the rename keeps the old text and no temporary file."""

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    path = tmp_path / "run.json"
    write_atomically(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, "new")
    assert {one.name: one.read_text() for one in tmp_path.iterdir()} == {"run.json": "old"}


def test_files_are_published_and_given_a_second_place(place: Location, tmp_path: Path) -> None:
    """Both places hold the bytes, whatever becomes of the other."""
    source = tmp_path / "made.tar"
    source.write_bytes(b"x" * 100_000)
    publish(source, place / "one" / "a.tar")
    duplicate(place / "one" / "a.tar", place / "two" / "a.tar")
    remove_tree(place / "one")
    assert not (place / "one" / "a.tar").exists()
    assert (place / "two" / "a.tar").read_bytes() == b"x" * 100_000


def test_a_second_place_replaces_what_is_there(place: Location, tmp_path: Path) -> None:
    """As when a unit is taken over where an older one lies."""
    for name in ("old", "new"):
        (tmp_path / name).write_text(name)
        publish(tmp_path / name, place / name)
    duplicate(place / "new", place / "old")
    assert (place / "old").read_text() == "new"


def test_removing_what_is_not_there_does_nothing(place: Location) -> None:
    """Clearing up twice is no error."""
    remove_tree(place / "nothing")
    assert not (place / "nothing").exists()


def test_a_file_is_at_hand_for_as_long_as_it_is_needed(place: Location) -> None:
    """By its own name; a copy is gone afterwards, a local file stays."""
    source = place / "grids" / "images-1.png"
    write_atomically(source, "png")
    with local_copy(source) as path:
        assert (path.name, path.read_text()) == ("images-1.png", "png")
    assert path.exists() != is_remote(source)


def test_where_links_are_unknown_a_write_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty file would stand for a receipt or a lease that nobody wrote."""

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no links")

    def no_room(number: int) -> None:
        if os.readlink(f"/proc/self/fd/{number}").endswith("/a.json"):
            raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(os, "link", no_links)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        with pytest.raises(OSError, match="no room"):
            create_exclusively(tmp_path / "a.json", "text")
    assert list(tmp_path.iterdir()) == []
    assert create_exclusively(tmp_path / "a.json", "text")
    assert not create_exclusively(tmp_path / "a.json", "other")
