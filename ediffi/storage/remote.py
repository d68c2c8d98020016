"""Reading from object stores through fsspec: whole files, ranges, sizes.

A location is a path or a URL. Plain paths and `file://` are local and never come here. Endpoint
and credentials come from the environment that each store's library reads (for `s3://`:
AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION).

File systems are asked for anew at every call: fsspec keeps one per process, so that a forked
worker never talks through its parent's connections.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_CHUNK_BYTES = 16 << 20  # one request of a download
_CHUNKS_AT_ONCE = 4  # requests under way together: one connection does not fill a fast link


class RemoteError(OSError):
    """A remote file could not be read as promised."""


def is_remote(location: str | Path) -> bool:
    """Whether a location needs fsspec: any URL but `file://`."""
    return "://" in str(location) and not str(location).startswith("file://")


def local_path(location: str | Path) -> Path:
    """The path of a local location, `file://` taken off."""
    return Path(str(location).removeprefix("file://"))


def read_files(locations: Sequence[str | Path]) -> list[bytes]:
    """The bytes of small files, local or of one store, all requests at once.

    Raises:
        OSError: one cannot be read; FileNotFoundError if it is not there.
    """
    if not all(is_remote(location) for location in locations):
        return [local_path(location).read_bytes() for location in locations]
    urls = [str(location) for location in locations]
    file_system, _ = _open(urls[0])
    paths = [file_system._strip_protocol(url) for url in urls]
    found = file_system.cat(paths, on_error="return")
    return [_checked(url, found[path]) for url, path in zip(urls, paths)]


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Read (URL, offset, number of bytes) from one store, all requests at once.

    Raises:
        RemoteError: a file is shorter than asked for.
        OSError: a file cannot be read.
    """
    wanted = [(url, offset, num_bytes) for url, offset, num_bytes in ranges if num_bytes]
    if not wanted:
        return [b""] * len(ranges)
    file_system, _ = _open(wanted[0][0])
    found = file_system.cat_ranges(
        [file_system._strip_protocol(url) for url, _, _ in wanted],
        [offset for _, offset, _ in wanted],
        [offset + num_bytes for _, offset, num_bytes in wanted],
    )
    parts = iter(_checked(url, data, num_bytes) for (url, _, num_bytes), data in zip(wanted, found))
    return [next(parts) if num_bytes else b"" for _, _, num_bytes in ranges]


def chunks(url: str, num_bytes: int) -> Iterator[bytes]:
    """Download a file in pieces, some requests ahead.

    Raises:
        RemoteError: the file is shorter than `num_bytes`.
        OSError: it cannot be read.
    """
    step_bytes = _CHUNK_BYTES * _CHUNKS_AT_ONCE
    for start in range(0, num_bytes, step_bytes):
        end = min(start + step_bytes, num_bytes)
        yield from read_ranges(
            [
                (url, offset, min(_CHUNK_BYTES, end - offset))
                for offset in range(start, end, _CHUNK_BYTES)
            ]
        )


def size_and_version(url: str) -> tuple[int, str]:
    """Size of a remote file, and a text that changes when its bytes do (ETag, time).

    Raises:
        OSError: it cannot be read; FileNotFoundError if it is not there.
    """
    file_system, path = _open(url)
    file_system.invalidate_cache()
    about = file_system.info(path)
    version = about.get("ETag") or about.get("LastModified") or about.get("mtime") or ""
    return int(about["size"]), str(version)


def sizes_in_folders(urls: Sequence[str]) -> dict[str, int]:
    """Sizes of remote files, by one listing a folder; a file that is not there is left out.

    Raises:
        OSError: a folder cannot be listed.
    """
    folders = {url.rpartition("/")[0] for url in urls}
    sizes: dict[str, int] = {}
    for folder in sorted(folders):
        file_system, path = _open(folder)
        file_system.invalidate_cache()
        try:
            entries = file_system.ls(path, detail=True)
        except FileNotFoundError:  # no file of this folder is there
            continue
        for entry in entries:
            sizes[f"{folder}/{entry['name'].rpartition('/')[2]}"] = int(entry["size"] or 0)
    return {url: sizes[url] for url in urls if url in sizes}


def _open(url: str) -> tuple[AbstractFileSystem, str]:
    try:
        import fsspec
    except ImportError as error:
        raise RemoteError(f"{url}: reading URLs needs fsspec: pip install fsspec") from error
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # no library for this scheme, or no such scheme
        raise RemoteError(f"{url}: {error}") from error


def _checked(url: str, data: bytes | Exception, num_bytes: int | None = None) -> bytes:
    if isinstance(data, FileNotFoundError):
        raise FileNotFoundError(f"{url}: not found") from data
    if isinstance(data, Exception):
        raise RemoteError(f"{url}: {type(data).__name__}: {data}") from data
    if num_bytes is not None and len(data) != num_bytes:
        raise RemoteError(
            f"{url}: {len(data)} of {num_bytes} bytes came: the file is shorter than recorded; "
            "produce it again"
        )
    return data
