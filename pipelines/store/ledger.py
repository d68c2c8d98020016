"""The durable truth: content-addressed stages in a store that any driver can pick up again.

<store>/<stage>/<fingerprint>/manifest.json       written last: exists <=> the stage is complete
                             /receipts.jsonl      all receipts of a complete stage
                             /made.json           which run made it, and when
                             /identity.json       what the fingerprint stands for
                             /receipts/<unit>.json   written last of a unit
                             /durable/<unit>/     checkpoints and progress, across attempts
                             /...                 the published files
                             /lease/              which driver works here, see `lease`
<store>/runs/<run_id>.json                        what each run did
<store>/runs/<run_id>/lease/                      the heartbeat of a run under way
<store>/.scratch/<run_id>/                        work in flight; never read by anyone else
<store>/ediffi-store.json                         which version's store it is, and what it can do
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import Damaged, RetryableError, UserError
from pipelines.stage import Json, Manifest
from pipelines.store.fingerprint import NUM_HEX_DIGITS
from pipelines.store.location import (
    Location,
    check_exclusive_create,
    location,
    names_in,
    read_text,
    remove_tree,
    write_atomically,
)
from pipelines.store.outages import as_retryable, why_it_failed
from pipelines.store.stage_record import StageRecord, dump

FORMAT = 2
MARK_FILE = "ediffi-store.json"
SCRATCH_FOLDER = ".scratch"
# They hold a folder an encoder, or a folder a model.
GROUP_FOLDERS = ("embed", "super_resolution", "super_resolution_experts")
_FINGERPRINT = re.compile(rf"[0-9a-f]{{{NUM_HEX_DIGITS}}}")


@dataclass(frozen=True)
class Ledger:
    """All stages and runs of one store: a directory that every node mounts, or an object store."""

    store: Location

    @classmethod
    def at(cls, store: str | Path) -> Ledger:
        """The ledger in `store`, which need not exist: for looking, not for writing.

        Raises:
            UserError: nothing can be stored there, such as under an unknown scheme.
        """
        try:
            place = location(store)
            if not isinstance(place, Path):
                place.fs  # noqa: B018  its library is imported only now
            return cls(place)
        except (ValueError, ImportError) as error:
            raise UserError(
                f"store: must be a directory or a URL such as s3://bucket/prefix, got "
                f"{str(store)!r}: {error}"
            ) from error

    @classmethod
    def checked(cls, store: str | Path) -> Ledger:
        """As `at`, of a store that this version may read: what every command on one begins with.

        Raises:
            UserError: as `at`; another version of ediffi made it, or its mark is damaged.
            RetryableError: it does not answer.
        """
        ledger = cls.at(store)
        with as_retryable(ledger.store, f"reading {MARK_FILE}"):
            ledger.mark()
        return ledger

    @classmethod
    def open(cls, store: str | Path) -> Ledger:
        """The ledger in `store`, which is created if need be.

        Raises:
            UserError: as `at`, or the directory cannot be created, or there is no such bucket; it
                does not create files exclusively; another version of ediffi made it.
            RetryableError: it does not answer, refuses our credentials, or has no room.
        """
        ledger = cls.at(store)
        try:
            if isinstance(ledger.store, Path):
                ledger.store.mkdir(parents=True, exist_ok=True)
            mark = ledger.mark()
            if not mark.get("exclusive_create"):
                check_exclusive_create(ledger.store)
                text = dump({"format": FORMAT, "exclusive_create": True})
                write_atomically(ledger.store / MARK_FILE, text)
        except UserError:
            raise
        except Exception as error:  # every object store has errors of its own
            raise _not_opened(ledger.store, error) from error
        return ledger

    def mark(self) -> Mapping[str, Json]:
        """What the store says of itself; empty for a new one.

        Raises:
            UserError: another version of ediffi made it, or its mark is damaged.
        """
        path = self.store / MARK_FILE
        try:
            mark = json.loads(read_text(path))
            found = mark["format"]
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged(
                f"{path}: must be a JSON object with a format, found something else ({error}); if "
                f'this is a store of ediffi, write {{"format": {FORMAT}}} there, else name another'
            ) from error
        if found != FORMAT:
            age = "a newer" if isinstance(found, int) and found > FORMAT else "another"
            raise UserError(
                f"{path}: format must be {FORMAT}, found {found!r}: {age} version of ediffi made "
                "this store; use that version, or another store; nothing was changed"
            )
        return mark

    def stage(self, name: str, fingerprint: str) -> StageRecord:
        return StageRecord(self.store / name / fingerprint)

    def records(self, name: str = "*") -> Iterator[StageRecord]:
        """Every folder of that stage (`embed`: each `embed/...`; `*`: any), finished or not.

        Also those in which a driver took the lease, and was killed before it did anything.
        """
        for stage in _folders(self.store) if name == "*" else [self.store / name]:
            for inner in _folders(stage):
                if _FINGERPRINT.fullmatch(inner.name) or (inner / "identity.json").exists():
                    yield StageRecord(inner)
                elif stage.name in GROUP_FOLDERS:
                    yield from (StageRecord(path) for path in _folders(inner))

    def manifests(self, name: str = "*") -> list[Manifest]:
        """Every finished stage of that name, newest first."""
        found = [record.manifest() for record in self.records(name) if record.is_complete]
        return sorted(found, key=lambda manifest: manifest.created, reverse=True)

    def scratch_of(self, run_id: str) -> Location:
        """The folder of all that a run has in flight, beside others' in the store."""
        return self.store / SCRATCH_FOLDER / run_id

    def local_scratch_of(self, run_id: str) -> Path:
        """What a run has in flight on this machine; cleared when it is over."""
        return self._local_scratch() / run_id

    def new_scratch(self, run_id: str = "") -> Path:
        """An empty local directory, on the store's own file system if that is local.

        Args:
            run_id: whose work it is; "" for nobody's, which is cleared once no run is under way.
        """
        path = self.local_scratch_of(run_id) / uuid.uuid4().hex
        path.mkdir(parents=True)
        return path

    def discard_scratch(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)

    def discard_scratch_of(self, run_id: str) -> None:
        """Remove what a run that is over had in flight, in the store and on this machine.

        Of a local folder the name goes first: a worker that still copies from it to a bucket must
        find it gone, not with less and less in it.
        """
        for place in self.scratch_places(run_id):
            if isinstance(place, Path):
                gone = place.with_name(f"gone-{uuid.uuid4().hex}")
                with suppress(FileNotFoundError):  # somebody else was faster
                    place.rename(gone)
                remove_tree(gone)
            else:
                remove_tree(place)

    def discard_local_scratch_of_ended(self) -> None:
        """On a worker's machine beside a bucket: remove what runs that are over had in flight.

        Drivers do it where they start, which on that machine may never be.
        """
        if isinstance(self.store, Path):
            return
        for name in names_in(self._local_scratch()):
            with suppress(FileNotFoundError):  # nobody's, or of a run that is about to begin
                if _run(self.store / "runs" / f"{name}.json")["state"] != "running":
                    self.discard_scratch_of(name)

    def scratch_places(self, run_id: str) -> list[Location]:
        """Where a run has something in flight, as far as this machine can see."""
        assert run_id
        places = dict.fromkeys([self.scratch_of(run_id), self.local_scratch_of(run_id)])
        return [place for place in places if place.exists()]

    def scratch_names(self) -> set[str]:
        """Runs that have left something in flight, and work of nobody's."""
        return {*names_in(self.store / SCRATCH_FOLDER), *names_in(self._local_scratch())}

    def _local_scratch(self) -> Path:
        """Beside an object store: a directory of this machine, one a store and user."""
        if isinstance(self.store, Path):
            return self.store / SCRATCH_FOLDER
        name = hashlib.sha256(str(self.store).encode()).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"ediffi-scratch-{os.getuid()}-{name}"

    def write_run(self, record: Mapping[str, Json]) -> None:
        write_atomically(self.store / "runs" / f"{record['run_id']}.json", dump(record))

    def runs(self) -> list[Json]:
        """Records of all runs, newest first.

        Raises:
            UserError: one is damaged.
        """
        folder = self.store / "runs"
        records = [_run(folder / name) for name in names_in(folder) if name.endswith(".json")]
        return sorted(records, key=lambda record: record["started"], reverse=True)

    def record_of(self, run_id: str) -> Json:
        """The record of one run, by its whole id, without a look at the others.

        Raises:
            FileNotFoundError: there is none.
            UserError: it is damaged.
        """
        return _run(self.store / "runs" / f"{run_id}.json")

    def run(self, run_id: str) -> Json:
        """The record of one run, named by its id or the beginning of it.

        Raises:
            UserError: no run or more than one begins so.
        """
        records = self.runs()
        found = [record for record in records if record["run_id"].startswith(run_id)]
        if len(found) != 1:
            known = ", ".join(record["run_id"] for record in records[:5]) or "none"
            problem = "no run" if not found else f"{len(found)} runs"
            raise UserError(f"{problem} in {self.store} named {run_id!r}; newest: {known}")
        return found[0]


def _not_opened(store: Location, error: Exception) -> UserError | RetryableError:
    """Why a store cannot be used, and what to do: what was never there is no outage."""
    is_local = isinstance(store, Path)
    is_absent = isinstance(error, FileNotFoundError) or (
        is_local and isinstance(error, PermissionError)
    )
    told = f"{type(error).__name__}: {error}"
    if not is_absent and (words := why_it_failed(error, store)):
        return RetryableError(f"store: {store}: {words}; then run the same command ({told})")
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    what = "a directory that this user may write" if is_local else "a bucket that there is"
    return UserError(f"store: cannot create or write {store}: {why}; name {what} with --store")


def _run(path: Location) -> Json:
    """A run's record; it must say at least what every command asks for."""
    try:
        record = json.loads(read_text(path))
        missing = {"run_id", "state", "started", "stages", "resolved"} - set(record)
        if missing or f"{record['run_id']}.json" != path.name:
            raise ValueError(f"lacks {sorted(missing)}" if missing else "names another run")
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(
            f"{path}: must be the record of a run, found something else ({error}); move it out of "
            "the store: no stage depends on it"
        ) from error
    return record


def _folders(place: Location) -> list[Location]:
    """Folders inside a place; none if it does not exist."""
    return [path for name in names_in(place) if (path := place / name).is_dir()]
