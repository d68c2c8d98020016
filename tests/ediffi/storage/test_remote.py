"""Reading an S3 server: files, ranges, sizes, and errors that name the address."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from ediffi.storage import remote


def put(url: str, data: bytes) -> str:
    file_system, path = fsspec.core.url_to_fs(url)
    file_system.pipe_file(path, data)
    return url


@pytest.mark.parametrize(
    ("location", "is_remote"),
    [("s3://b/k", True), ("memory://k", True), ("file:///a/b", False), ("a/b", False)],
)
def test_locations_are_told_apart(location: str, is_remote: bool) -> None:
    """Any URL but file:// is remote; paths are not."""
    assert remote.is_remote(location) is is_remote
    assert not remote.is_remote(Path("/a/b"))


def test_file_url_is_a_path(tmp_path: Path) -> None:
    """`file://` is taken off, and small files are read from there too."""
    path = tmp_path / "a"
    path.write_bytes(b"1")
    assert remote.local_path(f"file://{path}") == remote.local_path(path) == path
    assert remote.read_files([f"file://{path}", path]) == [b"1", b"1"]


def test_files_and_ranges_are_read(s3_store: str) -> None:
    """Results come in the order of the questions; an empty range asks nothing."""
    a, b = put(f"{s3_store}/a", b"0123456789"), put(f"{s3_store}/b", b"abc")
    assert remote.read_files([b, a, b]) == [b"abc", b"0123456789", b"abc"]
    ranges = [(a, 2, 3), (b, 0, 1), (a, 5, 0), (a, 9, 1)]
    assert remote.read_ranges(ranges) == [b"234", b"a", b"", b"9"]
    assert b"".join(remote.chunks(a, 10)) == b"0123456789"


def test_range_beyond_the_end_is_an_error(s3_store: str) -> None:
    """A file that became shorter is named, with both sizes."""
    url = put(f"{s3_store}/a", b"012")
    with pytest.raises(remote.RemoteError, match="a: 2 of 5 bytes came"):
        remote.read_ranges([(url, 1, 5)])


def test_missing_files_are_named(s3_store: str) -> None:
    """FileNotFoundError with the address, however it is asked for."""
    url = f"{s3_store}/nothing"
    for ask in (
        lambda: remote.read_files([url]),
        lambda: remote.read_ranges([(url, 0, 1)]),
        lambda: remote.size_and_version(url),
    ):
        with pytest.raises(FileNotFoundError, match="nothing"):
            ask()


def test_sizes_come_by_folder(s3_store: str) -> None:
    """Sizes of files in two folders; what is not there is left out, also a whole folder."""
    urls = [put(f"{s3_store}/{name}", b"x" * size) for name, size in (("a/1", 1), ("b/2", 2))]
    asked = [*urls, f"{s3_store}/a/3", f"{s3_store}/c/4"]
    assert remote.sizes_in_folders(asked) == dict(zip(urls, (1, 2)))
    assert remote.size_and_version(urls[1])[0] == 2


def test_unknown_scheme_is_named() -> None:
    """A URL that no library knows is an error with the URL in it."""
    with pytest.raises(remote.RemoteError, match="nonsense://a/b"):
        remote.read_files(["nonsense://a/b"])
