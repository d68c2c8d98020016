"""A local cache of remote files: verified, bounded, shared by all processes of a machine.

A file appears under its digest when it is whole, so a reader never sees a part. The files used
least recently make room for new ones. What this process fetched last stays until it fetches more
(`_NUM_PINNED` files): a path that `fetch` returns does not vanish before it is opened. A file that
a process has open or mapped can be read on after it was dropped.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from ediffi.storage import remote

_GIB = 1 << 30
_NUM_PINNED = 4  # a stage reads one file at a time, a reader maps what it fetched at once


def default_directory() -> Path:
    """What is kept for all runs of a user: EDIFFI_CACHE, or a folder of the user's home.

    Raises:
        RuntimeError: the user has no home.
    """
    return Path(os.environ.get("EDIFFI_CACHE", "~/.cache/ediffi")).expanduser()


class CacheError(OSError):
    """The cache cannot hold a file, or its settings are wrong."""


class DigestMismatch(CacheError):
    """A downloaded file is not the one that was recorded."""


@dataclass
class _Pins:
    """Shared locks on the files fetched last, which keep other processes from dropping them."""

    process_id: int = field(default_factory=os.getpid)
    handles: OrderedDict[Path, int] = field(default_factory=OrderedDict)


class LocalCache:
    """Files of object stores, kept in a directory of limited size.

    Args:
        directory: made if it is missing. A local file system: the locks need it.
        max_bytes: all files together. What processes have pinned stays even beyond it.

    Raises:
        ValueError: `max_bytes` below 1.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes of the cache must be at least 1, got {max_bytes}")
        self.directory = directory
        self.max_bytes = max_bytes
        self._pins = _Pins()
        self._lock = Lock()

    @classmethod
    def default(cls) -> LocalCache:
        """The cache that the environment describes: EDIFFI_CACHE, EDIFFI_CACHE_GIB.

        Raises:
            CacheError: EDIFFI_CACHE_GIB is not a number above 0.
        """
        text = os.environ.get("EDIFFI_CACHE_GIB", "50")
        try:
            return cls(default_directory(), int(float(text) * _GIB))
        except (ValueError, OverflowError) as error:
            raise CacheError(f"EDIFFI_CACHE_GIB must be a number above 0, got {text!r}") from error

    def fetch(self, url: str, *, sha256: str, num_bytes: int) -> Path:
        """Have a remote file here, and return its path. Several processes may ask at once.

        Args:
            url: as fsspec knows it.
            sha256: recorded digest; "": unknown. Then the store's own ETag or time tells whether
                a cached file is still the same, for one request.
            num_bytes: recorded size; 0: unknown.

        Raises:
            DigestMismatch: the file has another size or digest than recorded.
            CacheError: the file is larger than the whole cache.
            OSError: the store or the disk failed.
        """
        name = sha256
        if not sha256 or not num_bytes:
            found_bytes, version = remote.size_and_version(url)
            _check(url, "bytes", found_bytes, num_bytes or found_bytes)
            num_bytes = found_bytes
            name = name or hashlib.sha256(f"{url}\n{version}\n{num_bytes}".encode()).hexdigest()
        path = self.directory / name[:2] / name
        if self._pin(path, num_bytes):
            return path
        with self._locked(f"{name[:3]}.lock"):  # one process downloads, the others wait for it
            if not self._pin(path, num_bytes):
                self._download(url, path, sha256, num_bytes)
        return path

    def find(self, *, sha256: str, num_bytes: int) -> Path | None:
        """The path of a file that is here already, used from now on; None if it is not."""
        path = self.directory / sha256[:2] / sha256
        return path if sha256 and self._pin(path, num_bytes) else None

    def __reduce__(self) -> tuple[type[LocalCache], tuple[Path, int]]:
        """Pickled, a cache is its settings: locks stay in their process."""
        return LocalCache, (self.directory, self.max_bytes)

    def _pin(self, path: Path, num_bytes: int) -> bool:
        """Use a file, if it is there: mark it as used now and keep it from being dropped."""
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        fcntl.flock(handle, fcntl.LOCK_SH)
        if not path.exists() or os.fstat(handle).st_size != num_bytes:
            os.close(handle)  # dropped in this moment, or damaged by a stranger
            return False
        os.utime(path)
        with self._lock:
            self._forget_inherited()
            if path in self._pins.handles:
                os.close(self._pins.handles.pop(path))
            self._pins.handles[path] = handle
            while len(self._pins.handles) > _NUM_PINNED:
                os.close(self._pins.handles.popitem(last=False)[1])
        return True

    def _forget_inherited(self) -> None:
        """A forked process shares its parent's locks; closing its handles leaves them to it."""
        if self._pins.process_id != os.getpid():
            for handle in self._pins.handles.values():
                os.close(handle)
            self._pins = _Pins()

    def _download(self, url: str, path: Path, sha256: str, num_bytes: int) -> None:
        self._make_room(num_bytes, url)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_name(f"{path.name}.partial")  # ours alone: we hold its lock
        digest = hashlib.sha256()
        try:
            with open(partial_path, "wb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)  # else it would look like a crash's leaving
                file.truncate(num_bytes)  # so that others see the room it takes
                for chunk in remote.chunks(url, num_bytes):
                    digest.update(chunk)
                    file.write(chunk)
            if sha256:
                _check(url, "sha256", digest.hexdigest(), sha256)
            partial_path.replace(path)
        finally:
            partial_path.unlink(missing_ok=True)
        if not self._pin(path, num_bytes):
            raise CacheError(f"{path}: gone right after its download; is something clearing it?")

    def _make_room(self, num_bytes: int, url: str) -> None:
        """Drop what was used least recently, until `num_bytes` more fit."""
        if num_bytes > self.max_bytes:
            raise CacheError(
                f"{url}: {num_bytes} bytes, but the cache in {self.directory} may hold "
                f"{self.max_bytes}; raise EDIFFI_CACHE_GIB"
            )
        with self._locked("room.lock"):
            files = sorted(self._files(), key=lambda file: file[1].st_mtime_ns)
            total_bytes = sum(about.st_size for _, about in files) + num_bytes
            for path, about in files:
                if total_bytes <= self.max_bytes:
                    return
                if _drop_if_unused(path):
                    total_bytes -= about.st_size

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for folder in os.scandir(self.directory):
            if folder.is_dir() and len(folder.name) == 2:
                for file in os.scandir(folder.path):
                    try:
                        yield Path(file.path), file.stat()
                    except FileNotFoundError:  # finished or dropped by another process just now
                        continue

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Keep other threads and processes out of what `name` stands for."""
        folder = self.directory / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _drop_if_unused(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def _check(url: str, what: str, found: object, required: object) -> None:
    if found != required:
        raise DigestMismatch(
            f"{url}: {what} {found}, recorded {required}: the file is not the one that was "
            "recorded; produce it again"
        )
