"""The bytes of tars, wherever they lie: mapped if local, by ranges and a local cache if not.

A remote tar is fetched whole, in the background, from the moment it is touched; until it is here
its members are read by ranged requests, so the first sample waits for one request and not for a
shard. The cache checks the digest of what it fetched; a tar larger than the whole cache is read by
ranges throughout.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from threading import BoundedSemaphore, Thread

from ediffi.storage import remote
from ediffi.storage.local_cache import LocalCache
from ediffi.storage.shard_files import ShardFile
from ediffi.storage.tar_index import MappedTar, ShardError, TarIndex, read_index

_FETCHES_AT_ONCE = BoundedSemaphore(2)  # per process: more would only share the same link


class RemoteTar:
    """A tar in an object store that comes here in the background.

    Args:
        file: where it lies and what was recorded of it.
        cache: where it is kept.
    """

    def __init__(self, file: ShardFile, cache: LocalCache) -> None:
        self.url = str(file.location)
        self._file = file
        self._cache = cache
        self._mapped: MappedTar | None = None
        self._error: Exception | None = None
        self._is_asked_for = False

    def mapped(self) -> MappedTar | None:
        """The whole tar, if it is here; None while it is on its way, which the first call starts.

        Raises:
            OSError: fetching it failed.
        """
        if self._error:
            raise self._error
        if not self._is_asked_for:
            self._is_asked_for = True
            self._ask()
        return self._mapped

    def _ask(self) -> None:
        path = self._cache.find(sha256=self._file.sha256, num_bytes=self._file.num_bytes)
        if path:
            self._mapped = MappedTar(path)
        elif self._file.num_bytes <= self._cache.max_bytes:
            # A daemon: leaving in the middle of a download must not wait for its end.
            Thread(target=self._fetch, name=f"fetch {self.url}", daemon=True).start()

    def wait(self) -> MappedTar:
        """The whole tar, fetched now. Raises OSError if that fails."""
        return self._mapped or MappedTar(_fetched(self._file, self._cache))

    def _fetch(self) -> None:
        try:
            with _FETCHES_AT_ONCE:
                self._mapped = self.wait()
        except Exception as error:  # whatever it is, the next reader must see it
            self._error = error


Tar = MappedTar | RemoteTar
Request = tuple[Tar, int, int]  # tar, offset, number of bytes


def open_tar(file: ShardFile, cache: LocalCache) -> Tar:
    """Map a local tar, start fetching a remote one.

    Raises:
        ShardError: the file is empty, or not as long as recorded.
        OSError: it cannot be opened.
    """
    if remote.is_remote(file.location):
        return RemoteTar(file, cache)
    tar = MappedTar(remote.local_path(file.location))
    if file.num_bytes and len(tar) != file.num_bytes:
        raise ShardError(
            f"{file.location}: {len(tar)} bytes found, {file.num_bytes} recorded: the file is not "
            "the one that was recorded; produce it again"
        )
    return tar


def read_requests(requests: Sequence[Request]) -> list[bytearray]:
    """The bytes of many members; what must come over the network is asked for all at once.

    Raises:
        OSError: a file cannot be read.
    """
    data: list[bytearray | None] = []
    for tar, offset, num_bytes in requests:
        mapped = tar.mapped() if isinstance(tar, RemoteTar) else tar
        data.append(mapped.copy(offset, num_bytes) if mapped else None)
    missing = [i for i, found in enumerate(data) if found is None]
    if missing:
        ranges = [
            (tar.url, offset, num_bytes)
            for tar, offset, num_bytes in (requests[i] for i in missing)
            if isinstance(tar, RemoteTar)
        ]
        for i, found in zip(missing, remote.read_ranges(ranges)):
            data[i] = bytearray(found)
    return [found for found in data if found is not None]


def read_indexes(files: Sequence[ShardFile], tars: Sequence[Tar]) -> list[TarIndex]:
    """Where the members of several tars lie: from their sidecars, else from their headers.

    Raises:
        ShardError: a tar has no fitting sidecar and is not sound, see `MappedTar.index`.
        OSError: a tar cannot be read.
    """
    sidecars = _read_sidecars(files)
    return [_index(file, tar, sidecar) for file, tar, sidecar in zip(files, tars, sidecars)]


def _read_sidecars(files: Sequence[ShardFile]) -> list[bytes]:
    """The sidecars' bytes, b"" where there is none."""
    locations = [file.index_location for file in files if file.index_location]
    if not locations:
        return [b""] * len(files)
    groups = {remote.is_remote(location) for location in locations}
    try:
        if len(groups) == 1:
            found = iter(remote.read_files(locations))
        else:
            found = iter([remote.read_files([location])[0] for location in locations])
    except FileNotFoundError as error:
        warnings.warn(f"{error}: no sidecar, the headers are scanned", stacklevel=2)
        return [b""] * len(files)
    return [next(found) if file.index_location else b"" for file in files]


def _index(file: ShardFile, tar: Tar, sidecar: bytes) -> TarIndex:
    if sidecar:
        num_bytes = file.num_bytes if isinstance(tar, RemoteTar) else len(tar)
        try:
            where = str(file.index_location)
            return read_index(sidecar, where, tar_bytes=num_bytes, sha256=file.sha256)
        except ShardError as error:
            warnings.warn(f"{error}; the headers are scanned instead", stacklevel=2)
    return TarIndex.scan(tar.wait() if isinstance(tar, RemoteTar) else tar)


def _fetched(file: ShardFile, cache: LocalCache) -> Path:
    return cache.fetch(str(file.location), sha256=file.sha256, num_bytes=file.num_bytes)
