"""What in a store nobody needs: found by walking back from the runs and recipes to keep."""

from __future__ import annotations

import errno
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pipelines.caches.garbage_of_jobs import JobsSince
from pipelines.caches.lookup import Found, planned_by, stages_of
from pipelines.caches.verification import QUARANTINE_FOLDER, files_below
from pipelines.errors import UserError
from pipelines.planning import plan
from pipelines.recipe import CacheRecipe
from pipelines.run_record import RunRecord, is_dead, orphaned_scratch
from pipelines.stage import Json
from pipelines.store import lease, pulse
from pipelines.store.lease import LEASE_FOLDER
from pipelines.store.ledger import GROUP_FOLDERS, Ledger
from pipelines.store.location import Location, is_aside, names_in, remove_tree
from pipelines.store.processes import Owner
from pipelines.store.stage_record import DURABLE_FOLDER
from pipelines.worker.durable import CHECKPOINTS_FOLDER

LOGS_FOLDER = "logs"  # of the store, see `pipelines.worker.unit_log`
_UNITS_OF_TIME = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_TEMPORARY = re.compile(r".+\.partial|tmp[a-z0-9_]{8}/.+")  # of libraries, as they write
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_LOOK_S = 3.0  # between two looks for runs that have begun: each reads the records of all
_CHECKPOINTS = re.compile(rf"{DURABLE_FOLDER}/.*?/{CHECKPOINTS_FOLDER}(?=/)")


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """A folder or file to remove, and why nobody needs it."""

    place: Location
    num_bytes: int
    why: str
    is_stage: bool = False


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Addresses (`embed/t5/1f0c...`) that are needed, and those that runs work on right now."""

    addresses: frozenset[str]
    in_use: frozenset[str]
    running: frozenset[str]  # ids of runs under way
    recent: frozenset[str]  # and of those that ended not long ago, or that nobody saw end
    since: datetime  # not long ago


def parse_age(text: str) -> timedelta:
    """`90m`, `12h`, `30d` or `2w` as a length of time.

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"(\d+)([mhdw])", text)
    if match is None:
        raise UserError(f"--older-than must be like 90m, 12h, 30d or 2w, got {text!r}")
    return timedelta(**{_UNITS_OF_TIME[match[2]]: int(match[1])})


# -- what is needed -------------------------------------------------------------------------------


def find_kept(ledger: Ledger, recipes: Iterable[CacheRecipe], older_than: timedelta) -> Kept:
    """Walk back from the recipes, from every run that ended since, or that nobody saw end.

    Jobs that wait or run keep what their recipe needs. What a stage reads is needed with it, also
    where it adopted another stage's files.

    Raises:
        UserError: a recipe cannot be planned, or a job's record not be read.
    """
    since, running = datetime.now(UTC) - older_than, _running(ledger)
    roots: set[str] = set()
    in_use: set[str] = set()
    recent = set(running)
    for record in ledger.runs():
        if _is_recent(record, since):
            addresses = _addresses(planned_by(record))
            roots |= addresses
            recent.add(record["run_id"])
            in_use |= addresses if record["run_id"] in running else set()
    for recipe in recipes:
        roots |= _addresses({one.name: one.fingerprint for one in plan(recipe, ledger)})
    for planned in JobsSince.of(ledger, since).needed():
        roots |= _addresses(planned)
    here = {found.address: found for found in stages_of(ledger)}
    return Kept(
        addresses=_reachable(ledger, here, roots),
        in_use=_reachable(ledger, here, in_use),
        running=running,
        recent=frozenset(recent),
        since=since,
    )


def _is_recent(record: Json, since: datetime) -> bool:
    """Whether a run ended since then; one that is noted as running may be alive, or go on."""
    ended = record.get("ended") or record["started"]
    return record["state"] == "running" or datetime.fromisoformat(ended) >= since


def _addresses(fingerprints: Mapping[str, str]) -> set[str]:
    return {f"{name}/{fingerprint}" for name, fingerprint in fingerprints.items()}


def _reachable(ledger: Ledger, here: Mapping[str, Found], roots: Iterable[str]) -> frozenset[str]:
    """The roots and all that they were made from."""
    reached: set[str] = set()
    waiting = list(roots)
    while waiting:
        address = waiting.pop()
        if address in reached:
            continue
        reached.add(address)
        if address in here:
            found = here[address]
            waiting += [f"{name}/{one}" for name, one in found.inputs().items()]
            waiting += _adopted_from(ledger, found)
    return frozenset(reached)


def _adopted_from(ledger: Ledger, found: Found) -> set[str]:
    """Stages of this store whose files a stage uses where they lie."""
    root = str(ledger.store).rstrip("/") + "/"
    folders: set[str] = set()
    for receipt in found.receipts():
        for file in receipt.files:
            if file.path.startswith(root):
                parts = file.path.removeprefix(root).split("/")
                folders |= {"/".join(parts[:2]), "/".join(parts[:3])}  # ingest/..., embed/t5/...
    return folders


# -- what is not ----------------------------------------------------------------------------------


def find_garbage(ledger: Ledger, kept: Kept) -> Iterator[Garbage]:
    """Folders and files that can go, the scratch of a store that is at rest first."""
    known = {record["run_id"] for record in ledger.runs()}
    for name in orphaned_scratch(ledger, kept.running, known):
        for place in ledger.scratch_places(name):
            yield _folder(place, "work that was in flight when its run ended")
    for run_id in sorted(pulse.run_ids(ledger.store) - kept.running - kept.recent):
        yield _folder(pulse.folder(ledger.store, run_id), "the heartbeat of a run that is over")
    for run_id in sorted(set(names_in(ledger.store / LOGS_FOLDER)) - kept.recent):
        yield _folder(ledger.store / LOGS_FOLDER / run_id, "logs of a run of long ago")
    for place, why in JobsSince.of(ledger, kept.since).ended(kept.recent):
        yield _folder(place, why)
    for found in stages_of(ledger):
        if found.address in kept.in_use:
            continue
        directory = found.record.directory
        if found.address not in kept.addresses:
            yield _folder(directory, "no kept run or recipe needs it", is_stage=True)
            continue
        quarantine = directory / QUARANTINE_FOLDER
        if quarantine.exists():
            yield _folder(quarantine, "broken files that a repair replaced")
        yield from _left_over(found)
    yield from (_folder(place, "its removal was interrupted") for place in _half_removed(ledger))


def _left_over(found: Found) -> Iterator[Garbage]:
    """What a kept stage no longer needs: nobody works there."""
    directory = found.record.directory
    files = files_below(directory)
    checkpoints = {match[0] for name in files if (match := _CHECKPOINTS.match(name))}
    for name in sorted(checkpoints if found.record.is_complete else ()):
        yield _folder(directory / name, "checkpoints of a stage that is finished")
    newest = lease.newest_file(directory)
    for name, num_bytes in sorted(files.items()):
        place, why = directory / name, ""
        if name.startswith(f"{LEASE_FOLDER}/"):  # its last file stays: tokens only grow
            why = "of a driver that works here no more" if place != newest else ""
        elif name.startswith(f"{DURABLE_FOLDER}/"):
            continue
        elif is_aside(place.name) or _TEMPORARY.fullmatch(name):
            why = "being written when its writer died"
        if why:
            yield Garbage(place=place, num_bytes=num_bytes, why=why)


def _folder(place: Location, why: str, *, is_stage: bool = False) -> Garbage:
    num_bytes = sum(files_below(place).values())
    return Garbage(place=place, num_bytes=num_bytes, why=why, is_stage=is_stage)


def _half_removed(ledger: Ledger) -> list[Location]:
    """Stage folders that a removal had renamed and not yet emptied."""
    if not isinstance(ledger.store, Path):
        return []
    return sorted(
        place
        for pattern in ("*", *(f"{group}/*" for group in GROUP_FOLDERS))
        for place in ledger.store.glob(f"{pattern}/.gone-*")
    )


@dataclass
class Sweep:
    """Removes garbage, as long as no run begins that may need it."""

    ledger: Ledger
    kept: Kept
    _next_look: float = field(default=0.0, init=False)

    def remove(self, garbage: Garbage) -> str:
        """Remove it; returns "", or why it stays.

        Raises:
            UserError: a run has begun since `kept` was found: it may need what is to go.
        """
        if time.monotonic() >= self._next_look:
            check_still_at_rest(self.ledger, self.kept)
            self._next_look = time.monotonic() + _LOOK_S
        return remove(garbage)


def remove(garbage: Garbage) -> str:
    """Remove a folder or file; returns "", or why it, or something of it, stays.

    A stage stays if somebody has its lease. Its folder stops being one before the first of its
    files goes.
    """
    place = garbage.place
    if garbage.is_stage:
        return _remove_stage(place)
    if isinstance(place, Path) and not place.is_dir():
        place.unlink(missing_ok=True)
    else:
        remove_tree(place)
    return _what_stays(place)


def _remove_stage(place: Location) -> str:
    try:
        found = lease.acquire(place, Owner.of_this_process("gc"))
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        found = None  # nobody has the lease, and for taking it there is no room before this is gone
    if isinstance(found, lease.Held):
        return f"{found} works there"
    try:
        if isinstance(place, Path):
            gone = place.with_name(f".gone-{uuid.uuid4().hex}")
            os.rename(place, gone)
            remove_tree(gone)
            return _what_stays(gone)
        (place / "manifest.json").unlink(missing_ok=True)
        remove_tree(place / "receipts")
        remove_tree(place)
        return _what_stays(place)
    finally:
        if found is not None:
            found.release()


def _what_stays(place: Location) -> str:
    """Removing a tree passes over what it may not remove."""
    return f"{place} is still there: see the rights of its folders" if place.exists() else ""


def check_still_at_rest(ledger: Ledger, kept: Kept) -> None:
    """Raise UserError if a run has begun since `kept` was found: it may need what is to go."""
    if begun := _running(ledger) - kept.running:
        raise UserError(f"run {sorted(begun)[0]} began meanwhile; nothing more is removed")


def _running(ledger: Ledger) -> frozenset[str]:
    """Runs under way, as far as this machine can tell."""
    records = [RunRecord.read(record) for record in ledger.runs()]
    return frozenset(
        record.run_id
        for record in records
        if record.state == "running" and not is_dead(ledger, record)
    )
