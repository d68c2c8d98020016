"""The durable truth: content-addressed stages in a store that any driver can pick up again.

    <store>/<stage>/<fingerprint>/manifest.json       written last: exists <=> the stage is complete
                                 /identity.json       what the fingerprint stands for
                                 /receipts/<unit>.json   written last of a unit
                                 /durable/<unit>/     checkpoints and progress, across attempts
                                 /...                 the published files
    <store>/runs/<run_id>.json                        what each run did
    <store>/.scratch/                                 work in flight; never read by anyone else

Publishing is write aside, flush, rename. A process killed between any two instructions leaves
either the whole file under its name or nothing there.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipelines.errors import UserError
from pipelines.fingerprint import file_sha256
from pipelines.stage import File, Json, Manifest, Outcome, Receipt, Unit


def now() -> str:
    """The present, as UTC in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`; readers see the old bytes or the new, never a mixture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with aside.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, path)


@dataclass(frozen=True)
class StageRecord:
    """One stage's folder in the store, whether finished or not."""

    directory: Path

    @property
    def is_complete(self) -> bool:
        return (self.directory / "manifest.json").exists()

    def manifest(self) -> Manifest:
        return Manifest.load(self.directory)

    def open(self, identity: Json) -> None:
        """Note what this folder's fingerprint stands for, before any work is done."""
        if not (self.directory / "identity.json").exists():
            write_atomically(self.directory / "identity.json", _dump(identity))

    def receipt(self, unit: Unit) -> Receipt | None:
        """The unit's receipt, or None if it is not done."""
        path = self._receipt_path(unit.id)
        return Receipt.from_json(json.loads(path.read_text())) if path.exists() else None

    @property
    def num_receipts(self) -> int:
        return len(list((self.directory / "receipts").glob("*.json")))

    def durable_path(self, unit_id: str) -> Path:
        return self.directory / "durable" / unit_id

    def publish(
        self, unit: Unit, outcome: Outcome, scratch: Path, *, seconds: float, attempt: int
    ) -> Receipt:
        """Move the outcome's files out of `scratch` into the store; the receipt goes last."""
        files = [self._publish_file(scratch / name, name) for name in outcome.files]
        receipt = Receipt(
            unit=unit.id,
            files=(*files, *outcome.adopted),
            num_in=outcome.num_in,
            num_out=outcome.num_out,
            rejects={reason: list(keys) for reason, keys in outcome.rejects.items()},
            facts=dict(outcome.facts),
            seconds=round(seconds, 3),
            attempt=attempt,
            host=os.uname().nodename,
        )
        write_atomically(self._receipt_path(unit.id), _dump(receipt.to_json()))
        return receipt

    def complete(
        self, stage: str, identity: Json, inputs: Mapping[str, str], units: list[Unit], run_id: str
    ) -> Manifest:
        """Write the manifest. Every unit must have its receipt."""
        receipts = tuple(receipt for unit in units if (receipt := self.receipt(unit)) is not None)
        assert len(receipts) == len(units), f"{stage}: a unit has no receipt"
        manifest = Manifest(
            stage=stage,
            fingerprint=self.directory.name,
            directory=self.directory,
            identity=identity,
            inputs=dict(inputs),
            receipts=receipts,
            run_id=run_id,
            created=now(),
        )
        write_atomically(self.directory / "manifest.json", _dump(manifest.to_json()))
        return manifest

    def _receipt_path(self, unit_id: str) -> Path:
        return self.directory / "receipts" / f"{unit_id}.json"

    def _publish_file(self, source: Path, name: str) -> File:
        with source.open("rb") as stream:
            os.fsync(stream.fileno())
        file = File(path=name, sha256=file_sha256(source), num_bytes=source.stat().st_size)
        target = self.directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
        return file


@dataclass(frozen=True)
class Ledger:
    """All stages and runs of one store: a local directory or one that every node mounts."""

    store: Path

    @classmethod
    def at(cls, store: str | Path) -> Ledger:
        """The ledger in `store`, which need not exist: for looking, not for writing.

        Raises:
            UserError: the store is not a path (object stores are not supported yet).
        """
        text = str(store)
        if "://" in text and not text.startswith("file://"):
            raise UserError(
                f"store: must be a directory that every node can reach, got {text!r}; "
                "mount the bucket or use a shared file system"
            )
        return cls(Path(text.removeprefix("file://")).absolute())

    @classmethod
    def open(cls, store: str | Path) -> Ledger:
        """The ledger in `store`, which is created if need be.

        Raises:
            UserError: as `at`, or the directory cannot be created.
        """
        ledger = cls.at(store)
        try:
            ledger.store.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"store: cannot create {ledger.store}: {error.strerror}"
            raise UserError(problem) from error
        return ledger

    def stage(self, name: str, fingerprint: str) -> StageRecord:
        return StageRecord(self.store / name / fingerprint)

    def manifests(self, name: str = "*") -> Iterator[Manifest]:
        """Every finished stage of that name (`embed`: each `embed/...`; `*`: any), newest first."""
        patterns = (f"{name}/*/manifest.json", f"{name}/*/*/manifest.json")
        paths = {path for pattern in patterns for path in self.store.glob(pattern)}
        for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True):
            yield Manifest.load(path.parent)

    def new_scratch(self) -> Path:
        """An empty directory on the store's own file system, so that publishing is a rename."""
        path = self.store / ".scratch" / uuid.uuid4().hex
        path.mkdir(parents=True)
        return path

    def discard_scratch(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)

    def write_run(self, record: Mapping[str, Json]) -> None:
        write_atomically(self.store / "runs" / f"{record['run_id']}.json", _dump(record))

    def runs(self) -> list[Json]:
        """Records of all runs, newest first."""
        paths = (self.store / "runs").glob("*.json")
        records = [json.loads(path.read_text()) for path in paths]
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


def _dump(value: Json) -> str:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
