"""What an attack must leave behind: the bytes of an undisturbed run, and nothing else."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

from pipelines.store.ledger import Ledger
from pipelines.store.location import Location, is_aside
from pipelines.store.stage_record import StageRecord
from pipelines.worker.unit_log import paths


def digests(ledger: Ledger) -> dict[str, str]:
    """sha256 of manifests, lists of receipts and published files of every finished stage."""
    found = {}
    for record in ledger.records():
        if record.is_complete:
            for name in ("manifest.json", "receipts.jsonl", *_published(record)):
                path = _name(record.directory, ledger) + f"/{name}"
                found[path] = hashlib.sha256((record.directory / name).read_bytes()).hexdigest()
    return found


def problems(ledger: Ledger, place: Path, undisturbed: Mapping[str, str]) -> list[str]:
    """What is not as it should be once the command has succeeded; a line each.

    Args:
        place: the directory in which the command ran.
        undisturbed: `digests` of a run that nobody disturbed.
    """
    return [
        *_unequal(digests(ledger), undisturbed),
        *_untrue_receipts(ledger),
        *(f"run {one['run_id']} is {one['state']}" for one in _open_runs(ledger)),
        *(f"MLflow: {line}" for line in open_mlflow_runs(_database(ledger, place))),
        *(f"left behind: {name}" for name in _litter(ledger, place)),
        *(f"lease is held: {name}" for name in _held_leases(ledger)),
    ]


def num_begun(ledger: Ledger) -> int:
    """Attempts at units that were ever begun: each has its log."""
    runs = [record["run_id"] for record in ledger.runs()]
    return sum(1 for run_id in runs for log in paths(ledger, run_id) if log.rank == 0)


def num_units(ledger: Ledger) -> int:
    """Units that are done."""
    return sum(len(record.done_units()) for record in ledger.records())


def open_mlflow_runs(database: Path) -> list[str]:
    """Runs that MLflow believes to be under way: name and id of each."""
    if not database.exists():
        return []
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT name, run_uuid FROM runs WHERE status = 'RUNNING'")
        return [f"{name} ({run_id}) is RUNNING" for name, run_id in rows]


def _database(ledger: Ledger, place: Path) -> Path:
    side = ledger.store if isinstance(ledger.store, Path) else place / "ediffi-store"
    return side / "mlflow.db"


def _published(record: StageRecord) -> Iterator[str]:
    for receipt in record.manifest().receipts:
        yield from (file.path for file in receipt.files if not file.is_adopted)


def _name(directory: Location, ledger: Ledger) -> str:
    """A stage's folder relative to the store, so that stores can be compared."""
    return str(directory).removeprefix(str(ledger.store)).strip("/")


def _unequal(ours: Mapping[str, str], undisturbed: Mapping[str, str]) -> list[str]:
    lines = [f"missing: {name}" for name in sorted(undisturbed.keys() - ours.keys())]
    lines += [f"too many: {name}" for name in sorted(ours.keys() - undisturbed.keys())]
    common = sorted(ours.keys() & undisturbed.keys())
    return lines + [f"differs: {name}" for name in common if ours[name] != undisturbed[name]]


def _untrue_receipts(ledger: Ledger) -> Iterator[str]:
    """Receipts that do not say what lies there."""
    for record in ledger.records():
        for receipt in record.manifest().receipts if record.is_complete else ():
            for file in receipt.files:
                path = file.place(record.directory)
                if hashlib.sha256(path.read_bytes()).hexdigest() != file.sha256:
                    yield f"receipt of {receipt.unit} does not hold for {path}"


def _open_runs(ledger: Ledger) -> list[Mapping[str, str]]:
    return [record for record in ledger.runs() if record["state"] == "running"]


def _litter(ledger: Ledger, place: Path) -> Iterator[str]:
    """Work that was in flight when its process died, and that nobody has cleared away."""
    for folder in sorted((place / "tmp").glob("ediffi-*")):
        yield from (str(one) for one in sorted(folder.rglob("*")) if not one.is_dir())
    if isinstance(ledger.store, Path):
        scratch = ledger.store / ".scratch"
        yield from (str(one) for one in sorted(scratch.rglob("*")) if not one.is_dir())
        for one in sorted(ledger.store.rglob(".*")):
            if is_aside(one.name):
                yield str(one)
        yield from (str(one) for one in (ledger.store / "runs").glob("*.stop"))


def _held_leases(ledger: Ledger) -> Iterator[str]:
    """Of every stage the lease of the highest number, unless it was given back."""
    for record in ledger.records():
        folder = record.directory / "lease"
        if not folder.exists():
            continue
        names = sorted(one.name for one in folder.iterdir() if one.name.endswith(".json"))
        if names and not json.loads((folder / names[-1]).read_text()).get("released"):
            yield f"{_name(folder, ledger)}/{names[-1]}"
