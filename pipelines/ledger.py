"""The durable truth: content-addressed stages in a store that any driver can pick up again.

<store>/<stage>/<fingerprint>/manifest.json       written last: exists <=> the stage is complete
                             /receipts.jsonl      all receipts of a complete stage
                             /made.json           which run made it, and when
                             /identity.json       what the fingerprint stands for
                             /receipts/<unit>.json   written last of a unit
                             /durable/<unit>/     checkpoints and progress, across attempts
                             /...                 the published files
<store>/runs/<run_id>.json                        what each run did
<store>/.scratch/                                 work in flight; never read by anyone else
"""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import UserError
from pipelines.location import Location, is_remote, location, names_in, write_atomically
from pipelines.stage import Json, Manifest
from pipelines.stage_record import StageRecord, dump

# They hold a folder an encoder, or a folder a model.
GROUP_FOLDERS = ("embed", "super_resolution", "super_resolution_experts")


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
            return cls(location(store))
        except (ValueError, ImportError) as error:
            raise UserError(
                f"store: must be a directory or a URL such as s3://bucket/prefix, got "
                f"{str(store)!r}: {error}"
            ) from error

    @classmethod
    def open(cls, store: str | Path) -> Ledger:
        """The ledger in `store`, which is created if need be.

        Raises:
            UserError: as `at`, or the directory cannot be created, or the bucket reached.
        """
        ledger = cls.at(store)
        try:
            if is_remote(ledger.store):
                write_atomically(ledger.store / "ediffi-store.json", dump({"format": 2}))
            else:
                ledger.store.mkdir(parents=True, exist_ok=True)
        except Exception as error:  # every object store has errors of its own
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            problem = f"store: cannot create or write {ledger.store}: {why}"
            raise UserError(problem) from error
        return ledger

    def stage(self, name: str, fingerprint: str) -> StageRecord:
        return StageRecord(self.store / name / fingerprint)

    def records(self, name: str = "*") -> Iterator[StageRecord]:
        """Every folder of that stage (`embed`: each `embed/...`; `*`: any), finished or not."""
        for stage in _folders(self.store) if name == "*" else [self.store / name]:
            for inner in _folders(stage):
                if (inner / "identity.json").exists():
                    yield StageRecord(inner)
                elif stage.name in GROUP_FOLDERS:
                    yield from (StageRecord(path) for path in _folders(inner))

    def manifests(self, name: str = "*") -> list[Manifest]:
        """Every finished stage of that name, newest first."""
        found = [record.manifest() for record in self.records(name) if record.is_complete]
        return sorted(found, key=lambda manifest: manifest.created, reverse=True)

    def new_scratch(self) -> Path:
        """An empty local directory, on the store's own file system if that is local."""
        if not isinstance(self.store, Path):
            return Path(tempfile.mkdtemp(prefix="ediffi-"))
        path = self.store / ".scratch" / uuid.uuid4().hex
        path.mkdir(parents=True)
        return path

    def discard_scratch(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)

    def write_run(self, record: Mapping[str, Json]) -> None:
        write_atomically(self.store / "runs" / f"{record['run_id']}.json", dump(record))

    def runs(self) -> list[Json]:
        """Records of all runs, newest first."""
        records = [
            json.loads((self.store / "runs" / name).read_text())
            for name in names_in(self.store / "runs")
            if name.endswith(".json")
        ]
        return sorted(records, key=lambda record: record["started"], reverse=True)

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


def _folders(place: Location) -> list[Location]:
    """Folders inside a place; none if it does not exist."""
    return [path for name in names_in(place) if (path := place / name).is_dir()]
