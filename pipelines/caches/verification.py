"""Holding what lies in the store against its receipts, byte by byte, on several threads."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from pipelines.caches.lookup import Found
from pipelines.stage import (
    CIRCUMSTANCES_FILE,
    RECEIPTS_FILE,
    File,
    Manifest,
    Receipt,
)
from pipelines.store.lease import LEASE_FOLDER
from pipelines.store.location import Location
from pipelines.store.stage_record import DURABLE_FOLDER

QUARANTINE_FOLDER = "quarantine"  # of a stage: broken files that `repair` moved out of the way
NUM_THREADS = 8  # hashing leaves Python's lock alone, and an object store answers late
WINDOW_UNITS = 256  # looked at together: bounds what is in memory
CHUNK_BYTES = 1 << 20
IDENTITY_FILE = "identity.json"
_OWN_FILES = {IDENTITY_FILE, "manifest.json", CIRCUMSTANCES_FILE, RECEIPTS_FILE}
_OWN_FOLDERS = {
    DURABLE_FOLDER,
    LEASE_FOLDER,
    QUARANTINE_FOLDER,
}  # what lies there is no published file

Kind = Literal["missing", "changed", "receipt", "stage", "extra"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong.

    Attributes:
        kind: `missing` or `changed` files, a damaged `receipt`, a `stage` whose own files are
            damaged, or `extra` files that no receipt names, which harm nobody.
        unit: whose it is; "": the stage's own, or nobody's.
        file: as the receipt names it; "" where the receipt itself is meant.
    """

    kind: Kind
    unit: str
    file: str
    message: str

    @property
    def is_harmless(self) -> bool:
        return self.kind == "extra"

    def __str__(self) -> str:
        return f"{f'unit {self.unit}: ' if self.unit else ''}{self.message}"


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was looked at in one stage, and what is wrong with it."""

    num_units: int
    num_files: int
    num_bytes: int
    problems: Sequence[Problem]

    @property
    def is_sound(self) -> bool:
        return all(problem.is_harmless for problem in self.problems)


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """One unit, read through."""

    files: tuple[File, ...] = ()
    problems: tuple[Problem, ...] = ()


def verify(found: Found) -> Verified:
    """Read every file of a stage and every receipt, finished or not.

    Of a finished stage also the gathered receipts are held against the manifest and against each
    unit's own. Memory holds the names of the files, not what is in them.
    """
    problems: list[Problem] = []
    try:
        found.identity()
    except ValueError as error:
        problems.append(Problem(kind="stage", unit="", file=IDENTITY_FILE, message=str(error)))
    try:
        manifest = found.manifest()
    except ValueError as error:
        problems.append(Problem(kind="stage", unit="", file="manifest.json", message=str(error)))
        manifest = None
    units = _unfinished(found) if manifest is None else _finished(manifest, problems)
    return _verify_units(found, units, problems)


def sha256_of(place: Location) -> str:
    """Hex digest of the bytes of a local or remote file."""
    digest = hashlib.sha256()
    with place.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


# -- units ----------------------------------------------------------------------------------------


_Expected = tuple[str, Receipt | None]  # a unit, and its receipt among the gathered ones


def _unfinished(found: Found) -> Iterator[_Expected]:
    """Every unit that has a receipt; nothing was gathered yet."""
    for unit in sorted(found.record.done_units()):
        yield unit, None


def _finished(manifest: Manifest, problems: list[Problem]) -> Iterator[_Expected]:
    """Every unit with its gathered receipt; what is wrong with those is noted."""
    digest, num_units = hashlib.sha256(), 0
    path = manifest.directory / RECEIPTS_FILE

    def note(message: str) -> None:
        told = f"{path}: {message}"
        problems.append(Problem(kind="stage", unit="", file=RECEIPTS_FILE, message=told))

    try:
        with path.open("rb") as stream:
            for line in stream:
                digest.update(line)
                num_units += 1
                try:
                    receipt = Receipt.from_json(json.loads(line))
                except (ValueError, KeyError, TypeError) as error:
                    note(f"line {num_units}: damaged: {error}")
                    continue
                yield receipt.unit, receipt
    except FileNotFoundError:
        note("missing")
        return
    if num_units != manifest.num_units:
        note(f"{num_units} receipts, the manifest says {manifest.num_units}")
    if digest.hexdigest() != manifest.contents:
        note(f"sha256 is {digest.hexdigest()[:16]}, the manifest says {manifest.contents[:16]}")


def _verify_units(found: Found, units: Iterator[_Expected], problems: list[Problem]) -> Verified:
    expected: set[str] = set()
    num_units = num_files = num_bytes = 0
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for (unit, _), checked in _in_order(pool, lambda one: _check_unit(found, *one), units):
            num_units += 1
            expected.add(f"receipts/{unit}.json")
            for file in checked.files:
                num_files += 1
                num_bytes += file.num_bytes
                expected.add(file.path)
            problems += checked.problems
    problems += _extra_files(found.record.directory, expected)
    return Verified(
        num_units=num_units, num_files=num_files, num_bytes=num_bytes, problems=problems
    )


def _in_order(
    pool: ThreadPoolExecutor,
    check: Callable[[_Expected], _Checked],
    units: Iterator[_Expected],
) -> Iterator[tuple[_Expected, _Checked]]:
    """Each unit with what became of it, a window at a time."""
    while window := list(islice(units, WINDOW_UNITS)):
        yield from zip(window, pool.map(check, window))


def _check_unit(found: Found, unit: str, gathered: Receipt | None) -> _Checked:
    """Look at one unit's receipt and files."""
    path = found.record.directory / "receipts" / f"{unit}.json"

    def broken(message: str) -> Problem:
        return Problem(kind="receipt", unit=unit, file="", message=f"{path}: {message}")

    problems: list[Problem] = []
    own: Receipt | None = None
    try:
        own = found.record.receipt(unit)
    except (ValueError, KeyError, TypeError) as error:
        problems.append(broken(f"damaged: {error}"))
    else:
        if own is None:
            problems.append(broken("missing"))
        elif gathered is not None and own.proof() != gathered.proof():
            problems.append(broken(f"says something else than {RECEIPTS_FILE}"))
    receipt = gathered or own
    files = receipt.files if receipt is not None else ()
    problems += (problem for file in files for problem in _check_file(found, unit, file))
    return _Checked(files=tuple(files), problems=tuple(problems))


def _check_file(found: Found, unit: str, file: File) -> Iterator[Problem]:
    """Nothing, or what is wrong with a file: its size is asked first."""
    path = found.path(file)

    def problem(kind: Kind, message: str) -> Problem:
        return Problem(kind=kind, unit=unit, file=file.path, message=f"{path}: {message}")

    try:
        num_bytes = path.stat().st_size
        if num_bytes != file.num_bytes:
            yield problem("changed", f"{num_bytes} bytes, the receipt says {file.num_bytes}")
        elif (sha256 := sha256_of(path)) != file.sha256:
            told = f"sha256 is {sha256[:16]}, the receipt says {file.sha256[:16]}"
            yield problem("changed", told)
    except FileNotFoundError:
        yield problem("missing", "missing")
    except OSError as error:
        yield problem("changed", f"cannot be read: {error}")


# -- files that nobody names ----------------------------------------------------------------------


def _extra_files(directory: Location, expected: set[str]) -> Iterator[Problem]:
    for name in sorted(files_below(directory)):
        parts = name.split("/")
        if name in expected or name in _OWN_FILES or parts[0] in _OWN_FOLDERS:
            continue
        if not any(part.startswith(".") for part in parts):  # those are being written
            message = f"{directory / name}: no receipt names it"
            yield Problem(kind="extra", unit="", file=name, message=message)


def files_below(directory: Location) -> dict[str, int]:
    """Every file in a folder, hidden ones too: relative name -> size in bytes."""
    if isinstance(directory, Path):
        return dict(_local_files(directory))
    prefix = directory.path.rstrip("/") + "/"
    entries = directory.fs.find(directory.path, detail=True)
    return {path.removeprefix(prefix): entry["size"] for path, entry in entries.items()}


def _local_files(directory: Path) -> Iterator[tuple[str, int]]:
    for folder, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(folder, name)
            try:
                yield os.path.relpath(path, directory), os.lstat(path).st_size
            except FileNotFoundError:  # others are at work here
                continue
