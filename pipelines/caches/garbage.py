"""What in a store nobody needs: found by walking back from the runs and recipes to keep."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pipelines.caches.lookup import Found, planned_by, stages_of
from pipelines.caches.verification import QUARANTINE_FOLDER, files_below
from pipelines.errors import UserError
from pipelines.ledger import GROUP_FOLDERS, Ledger
from pipelines.location import Location, remove_tree
from pipelines.planning import plan
from pipelines.recipe import CacheRecipe
from pipelines.stage import Json
from pipelines.workflow import RunRecord

SCRATCH_FOLDER = ".scratch"
_UNITS_OF_TIME = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_TEMPORARY = re.compile(  # being written when its writer died
    r"(.*/)?\.[^/]+\.[0-9a-f]{32}|.+\.partial|tmp[a-z0-9_]{8}/.+"
)


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
    """Walk back from the recipes, from every run started since, and from those under way.

    What a stage reads is needed with it, also where it adopted another stage's files.

    Raises:
        UserError: a recipe cannot be planned.
    """
    since, running = datetime.now(UTC) - older_than, _running(ledger)
    roots: set[str] = set()
    in_use: set[str] = set()
    for record in ledger.runs():
        is_running = record["run_id"] in running
        if is_running or datetime.fromisoformat(record["started"]) >= since:
            addresses = _addresses(planned_by(record))
            roots |= addresses
            in_use |= addresses if is_running else set()
    for recipe in recipes:
        roots |= _addresses({one.name: one.fingerprint for one in plan(recipe, ledger)})
    here = {found.address: found for found in stages_of(ledger)}
    return Kept(
        addresses=_reachable(ledger, here, roots),
        in_use=_reachable(ledger, here, in_use),
        running=running,
    )


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
            waiting += [f"{name}/{one}" for name, one in found.identity()["input"].items()]
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
    if not kept.running:
        scratch = ledger.store / SCRATCH_FOLDER
        if scratch.exists() and any(scratch.iterdir()):
            yield _folder(scratch, "work that was in flight when its run ended")
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
        for name, num_bytes in sorted(files_below(directory).items()):
            if _TEMPORARY.fullmatch(name) and not name.startswith("durable/"):
                why = "being written when its writer died"
                yield Garbage(place=directory / name, num_bytes=num_bytes, why=why)
    yield from (_folder(place, "its removal was interrupted") for place in _half_removed(ledger))


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


def remove(garbage: Garbage) -> None:
    """Remove it; a stage's folder stops being one before the first of its files goes."""
    place = garbage.place
    if not garbage.is_stage:
        if isinstance(place, Path) and not place.is_dir():
            place.unlink(missing_ok=True)
        else:
            remove_tree(place)
        return
    if isinstance(place, Path):
        gone = place.with_name(f".gone-{uuid.uuid4().hex}")
        os.rename(place, gone)
        remove_tree(gone)
        return
    (place / "manifest.json").unlink(missing_ok=True)
    remove_tree(place / "receipts")
    remove_tree(place)


def check_still_at_rest(ledger: Ledger, kept: Kept) -> None:
    """Raise UserError if a run has begun since `kept` was found: it may need what is to go."""
    if begun := _running(ledger) - kept.running:
        raise UserError(f"run {sorted(begun)[0]} began meanwhile; nothing more is removed")


def _running(ledger: Ledger) -> frozenset[str]:
    return frozenset(record["run_id"] for record in ledger.runs() if _is_running(record))


def _is_running(record: Json) -> bool:
    """Whether it is under way, as far as this machine can tell."""
    return record["state"] == "running" and not RunRecord(**record).is_orphan
