"""Where the members of a shard lie: scanned strictly, kept in a sidecar, or salvaged from a wreck.

A reader of whole shards uses `MappedTar.index`, which refuses anything doubtful. Its result can be
kept as `<shard>.index.json` beside the tar (`write_index`, `read_index`), so that a member is
reached without scanning. Ingest uses `salvage` on tars made elsewhere, which names every problem
and gives what is whole.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ediffi.storage.tar_headers import (
    ProblemReason,
    ShardError,
    Span,
    TarHeaders,
    TarProblem,
    split_member_name,
)

Members = dict[str, Span]  # lower-case extension -> where

INDEX_SUFFIX = ".index.json"
_INDEX_VERSION = 1
_HEADER_BYTES = 512  # no member's data begins before its header


class MappedTar:
    """A tar of samples, memory-mapped read-only.

    Raises:
        ShardError: the file is empty.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                problem = "the shard is empty (0 bytes)"
                raise TarProblem(path, "shard_empty", "", problem)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._view = memoryview(self._map)

    def __len__(self) -> int:
        """Size of the tar in bytes."""
        return len(self._map)

    def read(self, span: Span) -> bytes:
        """Copy out the bytes of one member."""
        return self._map[span.offset : span.offset + span.num_bytes]

    def copy(self, offset: int, num_bytes: int) -> bytearray:
        """The same as a writable copy, on which tensors can be built."""
        return bytearray(self._view[offset : offset + num_bytes])

    def index(self) -> dict[str, Members]:
        """Scan all headers once: key -> members, both in the order of the tar.

        Raises:
            ShardError: the tar is torn or damaged, has an unsafe or linked member, or a key or
                member occurs twice.
        """
        samples: dict[str, Members] = {}
        previous_key = None
        headers = self.headers()
        while (found := headers.next_file()) is not None:
            name, span = found
            split = split_member_name(name)
            if split is None:
                continue
            key, extension = split
            if key != previous_key and key in samples:
                problem = (
                    f"duplicate key {key!r}: its members must lie side by side and "
                    f"occur once, but {name!r} follows members of {previous_key!r}"
                )
                raise TarProblem(self.path, "duplicate_key", name, problem)
            members = samples.setdefault(key, {})
            if extension in members:
                problem = f"duplicate member {name!r}"
                raise TarProblem(self.path, "duplicate_member", name, problem)
            members[extension] = span
            previous_key = key
        return samples

    def headers(self) -> TarHeaders:
        """Walk the headers one by one, from the start."""
        return TarHeaders(self._map, self.path)

    def sha256(self) -> str:
        """Digest of the whole file, as hexadecimal digits."""
        return hashlib.sha256(self._map).hexdigest()

    def close(self) -> None:
        """Release the mapping and its file handle."""
        self._view.release()
        self._map.close()


@dataclass(frozen=True, kw_only=True)
class TarIndex:
    """Where every member of a tar lies, by columns: 16 bytes per member, and the keys."""

    tar_bytes: int
    keys: list[str]  # in the order of the tar
    spans: Mapping[str, NDArray[np.int64]]  # extension -> (samples, 2): offset (0: none), size

    def column(self, extension: str) -> NDArray[np.int64]:
        """Spans of one kind of member, (samples, 2); offset 0 where a sample has none."""
        none = np.zeros((len(self.keys), 2), dtype=np.int64)
        return self.spans.get(extension, none)

    @classmethod
    def scan(cls, tar: MappedTar) -> TarIndex:
        """Index a tar by its headers. Raises ShardError, see `MappedTar.index`."""
        samples = tar.index()
        extensions = sorted(set(chain.from_iterable(samples.values())))
        absent = (0, 0)
        return cls(
            tar_bytes=len(tar),
            keys=list(samples),
            spans={
                extension: np.array(
                    [members.get(extension, absent) for members in samples.values()], dtype=np.int64
                )
                for extension in extensions
            },
        )


def write_index(tar_path: Path, index_path: Path) -> None:
    """Write the sidecar of a finished tar; equal tars give equal bytes.

    The sidecar names the tar's size and sha256, so that it is never taken for another tar's.

    Raises:
        ShardError: the tar is not sound, see `MappedTar.index`.
    """
    with closing(MappedTar(tar_path)) as tar:
        index, sha256 = TarIndex.scan(tar), tar.sha256()
    columns = {
        extension: {"offset": spans[:, 0].tolist(), "num_bytes": spans[:, 1].tolist()}
        for extension, spans in index.spans.items()
    }
    content = {
        "version": _INDEX_VERSION,
        "tar": {"num_bytes": index.tar_bytes, "sha256": sha256},
        "keys": index.keys,
        "members": columns,
    }
    partial_path = index_path.with_name(index_path.name + ".partial")
    partial_path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
    partial_path.replace(index_path)


def read_index(data: bytes, where: str, *, tar_bytes: int, sha256: str) -> TarIndex:
    """Parse a sidecar and hold it against its tar.

    Args:
        data: the sidecar's content.
        where: its path or address, for messages.
        tar_bytes: size of the tar; 0: unknown, not compared.
        sha256: digest of the tar; "": unknown, not compared.

    Raises:
        ShardError: the sidecar is damaged, of another version, or another tar's.
    """
    try:
        content = json.loads(data)
        version, tar = content["version"], content["tar"]
        if version != _INDEX_VERSION:
            raise ShardError(f"{where}: index version {version!r}, this code reads 1")
        keys = content["keys"]
        spans = {name: _column(column, len(keys)) for name, column in content["members"].items()}
        found_bytes, found_sha256 = int(tar["num_bytes"]), str(tar["sha256"])
    except ShardError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ShardError(f"{where}: damaged index: {type(error).__name__}: {error}") from error
    for name, found, required in (
        ("num_bytes", found_bytes, tar_bytes),
        ("sha256", found_sha256, sha256),
    ):
        if required and found != required:
            raise ShardError(f"{where}: index of another tar: {name} {found}, required {required}")
    if len(set(keys)) != len(keys) or not all(isinstance(key, str) for key in keys):
        raise ShardError(f"{where}: damaged index: keys must be different texts")
    if any((column.sum(axis=1) > found_bytes).any() for column in spans.values()):
        raise ShardError(f"{where}: damaged index: a member ends behind the tar")
    return TarIndex(tar_bytes=found_bytes, keys=keys, spans=spans)


def _column(column: Mapping[str, Any], num_samples: int) -> NDArray[np.int64]:
    spans = np.array([column["offset"], column["num_bytes"]], dtype=np.int64)
    offset, num_bytes = spans
    is_absent = (offset == 0) & (num_bytes == 0)
    if spans.shape != (2, num_samples) or not (is_absent | (offset >= _HEADER_BYTES)).all():
        raise ValueError("members must be one offset and one size per key")
    if (num_bytes < 0).any():
        raise ValueError("a member has a negative size")
    return np.ascontiguousarray(spans.T)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with a tar."""

    reason: ProblemReason
    name: str  # path of the member concerned, "" where it is none in particular
    key: (
        str  # of the sample left out for it, "" where none is known (a duplicate's first one stays)
    )
    message: str


@dataclass(frozen=True, kw_only=True)
class Salvaged:
    """What is whole in a tar, and what is not."""

    samples: dict[str, Members]  # both in the order of the tar
    problems: list[Problem]  # empty: the tar is sound, `MappedTar.index` would accept it


@dataclass(kw_only=True)
class _Group:
    """Members of one key that lie side by side."""

    key: str
    members: Members
    doubt: TarProblem | None = None  # members of it may be lost in damage before or behind it
    is_lost: bool = False  # a member of it was refused, by a problem of its own


def salvage(path: Path) -> Salvaged:
    """Find the whole samples of a tar from a stranger, and name every problem.

    Nothing is extracted. A sample is left out, with a problem that names its key, if a member of
    it is cut, unsafe, a link or a device; if its key came before (the first one stays); or if it
    lies at a cut or beside damage and lacks an extension that all untouched samples have. Behind
    damage the walk goes on at the next sound header; how many samples the damage swallowed cannot
    be known.

    Raises:
        OSError: the file cannot be read.
    """
    problems: list[Problem] = []
    try:
        tar = MappedTar(path)
    except TarProblem as error:
        problems.append(_problem(error))
        return Salvaged(samples={}, problems=problems)
    with closing(tar):
        groups = _groups(tar.headers(), problems)
    first = _first_of_each_key(groups, problems)
    untouched = [group for group in first.values() if not group.doubt and not group.is_lost]
    needed = set.intersection(*(set(group.members) for group in untouched)) if untouched else set()
    samples = {}
    for key, group in first.items():
        if group.is_lost:
            continue
        if group.doubt and (lacking := needed - group.members.keys()):
            message = f"{group.doubt.problem}; sample {key!r} lacks {', '.join(sorted(lacking))}"
            reason = group.doubt.reason
            problems.append(Problem(reason=reason, name="", key=key, message=message))
        else:
            samples[key] = group.members
    return Salvaged(samples=samples, problems=problems)


def _groups(headers: TarHeaders, problems: list[Problem]) -> list[_Group]:
    """Walk a tar to its end, past whatever is wrong."""
    groups: list[_Group] = []
    doubt: TarProblem | None = None  # for the first group behind damage
    for entry in _entries(headers):
        problem = entry if isinstance(entry, TarProblem) else None
        if problem:
            problems.append(_problem(problem))
        split = split_member_name(entry.name if isinstance(entry, TarProblem) else entry[0])
        if split is None:
            if problem and problem.reason in ("shard_truncated", "shard_damaged"):
                doubt = problem
                if groups:
                    groups[-1].doubt = problem
            continue
        key, extension = split
        if not groups or groups[-1].key != key or extension in groups[-1].members:
            groups.append(_Group(key=key, members={}, doubt=doubt))
            doubt = None
        if isinstance(entry, TarProblem):
            groups[-1].is_lost = True
        else:
            groups[-1].members[extension] = entry[1]
    return groups


def _entries(headers: TarHeaders) -> Iterator[tuple[str, Span] | TarProblem]:
    while True:
        try:
            found = headers.next_file()
        except TarProblem as problem:
            yield problem
            if problem.reason == "shard_truncated":
                return
            if problem.reason == "shard_damaged" and not headers.resync():
                return
            continue
        if found is None:
            return
        yield found


def _first_of_each_key(groups: Sequence[_Group], problems: list[Problem]) -> dict[str, _Group]:
    first: dict[str, _Group] = {}
    previous_key = None
    for group in groups:
        if group.key not in first:
            first[group.key] = group
        else:
            is_apart = group.key != previous_key
            reason: ProblemReason = "duplicate_key" if is_apart else "duplicate_member"
            name = f"{group.key}.{next(iter(group.members), '')}"
            message = f"{name!r} again: a key must occur once, its members side by side"
            problems.append(Problem(reason=reason, name=name, key=group.key, message=message))
        previous_key = group.key
    return first


def _problem(error: TarProblem) -> Problem:
    split = split_member_name(error.name)
    key = split[0] if split else ""
    return Problem(reason=error.reason, name=error.name, key=key, message=error.problem)
