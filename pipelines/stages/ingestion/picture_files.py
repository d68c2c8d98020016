"""Pictures that lie as files in a folder: of this machine, or of an object store.

Each row ends as the path of the bytes, untouched, or as a `Rejection`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.stages.ingestion.rejects import Rejection
from pipelines.stages.ingestion.source_list import Row
from pipelines.store.location import Location

Fetched = Mapping[int, Path | Rejection]  # by row index

_NUM_REQUESTS = 16  # to an object store at a time


def find_pictures(
    rows: Sequence[Row], folder: Location, *, max_bytes: int, scratch: Path
) -> Fetched:
    """Files named by the rows' addresses, relative to the folder.

    Args:
        rows: their addresses are non-empty text.
        max_bytes: larger files are rejected, unread.
        scratch: where copies from an object store go.

    Raises:
        OSError: an object store cannot be read, other than for lack of one object.
    """
    if isinstance(folder, Path):
        return {row.index: _sized(local_path(folder, str(row.address)), max_bytes) for row in rows}
    copy = partial(_copy, folder=folder, max_bytes=max_bytes, scratch=scratch)
    with ThreadPoolExecutor(_NUM_REQUESTS) as pool:
        return dict(zip((row.index for row in rows), pool.map(copy, rows)))


def local_path(folder: Path, address: str) -> Path | Rejection:
    """The file that a relative path names, if it lies inside `folder`, links resolved."""
    unsafe = Rejection(reason="path_unsafe", message=f"{address!r} leads out of {folder}")
    if not _is_inner(address):
        return unsafe
    try:
        path = (folder / address).resolve()
    except (OSError, RuntimeError):  # a loop of links
        return unsafe
    if not path.is_relative_to(folder.resolve()):
        return unsafe
    if not path.is_file():
        return Rejection(reason="file_missing", message=f"no file at {folder / address}")
    return path


def max_bytes_of(max_picture_mib: float) -> int:
    """`data.max_picture_mib` in bytes."""
    return int(max_picture_mib * (1 << 20))


def too_large(num_bytes: int, max_bytes: int) -> Rejection:
    """For a picture above `data.max_picture_mib`."""
    problem = f"{num_bytes} bytes, data.max_picture_mib allows {max_bytes}"
    return Rejection(reason="image_too_large", message=problem)


def _is_inner(address: str) -> bool:
    path = PurePosixPath(address)
    return not path.is_absolute() and ".." not in path.parts


def _sized(path: Path | Rejection, max_bytes: int) -> Path | Rejection:
    if isinstance(path, Path) and (num_bytes := path.stat().st_size) > max_bytes:
        return too_large(num_bytes, max_bytes)
    return path


def _copy(row: Row, folder: Any, max_bytes: int, scratch: Path) -> Path | Rejection:
    """Copy one object to a file of its own, if it is there and not too large."""
    address = str(row.address)
    if not _is_inner(address):
        return Rejection(reason="path_unsafe", message=f"{address!r} leads out of {folder}")
    place = folder / address
    try:
        if (num_bytes := place.stat().st_size) > max_bytes:
            return too_large(num_bytes, max_bytes)
        data = place.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        return Rejection(reason="file_missing", message=f"nothing at {place}")
    path = scratch / f"picture-{row.index}"
    path.write_bytes(data)
    return path
