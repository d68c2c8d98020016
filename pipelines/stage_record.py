"""One stage's folder in the store: receipts of its units, and the manifest when all are there.

Publishing is write aside, flush, rename (or one request to an object store). A process killed
between any two instructions leaves either the whole file under its name or nothing there.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pipelines.fingerprint import canonical, file_sha256
from pipelines.location import (
    Location,
    duplicate,
    names_in,
    publish,
    remove_tree,
    write_atomically,
)
from pipelines.stage import (
    CIRCUMSTANCES_FILE,
    RECEIPTS_FILE,
    File,
    Json,
    Manifest,
    Outcome,
    Receipt,
    Totals,
    Unit,
)


def now() -> str:
    """The present, as UTC in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def dump(value: Json) -> str:
    """JSON for files that people read too."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


@dataclass(frozen=True)
class StageRecord:
    """One stage's folder in the store, whether finished or not."""

    directory: Location

    @property
    def is_complete(self) -> bool:
        return (self.directory / "manifest.json").exists()

    @property
    def fingerprint(self) -> str:
        return self.directory.name

    def manifest(self) -> Manifest:
        return Manifest.load(self.directory)

    def open(self, identity: Json, input_contents: Mapping[str, str]) -> bool:
        """Note what this folder stands for and what its inputs hold, before any work is done.

        Returns:
            Whether all receipts found here were made from these very contents. If they changed
            since, the manifest and unfinished work are gone afterwards; which receipts still hold
            their keys say, now and after any crash.
        """
        path = self.directory / "identity.json"
        noted = self._noted()
        if noted is not None:
            if noted["input_contents"] == dict(input_contents):
                return self.is_trusted(input_contents)
            (self.directory / "manifest.json").unlink(missing_ok=True)
            remove_tree(self.directory / "durable")
        document = {"identity": identity, "input_contents": dict(input_contents)}
        write_atomically(path, dump({**document, "is_trusted": noted is None}))
        return noted is None

    def is_trusted(self, input_contents: Mapping[str, str]) -> bool:
        """Whether all receipts here were made from these contents, without a look at their keys."""
        noted = self._noted() or {"input_contents": None}
        return noted["input_contents"] == dict(input_contents) and bool(noted.get("is_trusted"))

    def _noted(self) -> Json:
        """What `open` wrote; None if it never did."""
        try:
            return json.loads((self.directory / "identity.json").read_text())
        except FileNotFoundError:
            return None

    def receipt(self, unit_id: str) -> Receipt | None:
        """The unit's receipt, or None if it is not done."""
        try:
            return Receipt.from_json(json.loads(self._receipt_path(unit_id).read_text()))
        except FileNotFoundError:
            return None

    def done_units(self) -> set[str]:
        """Ids of all units that have a receipt."""
        names = names_in(self.directory / "receipts")
        return {name.removesuffix(".json") for name in names if name.endswith(".json")}

    def durable_path(self, unit_id: str) -> Location:
        return self.directory / "durable" / unit_id

    def publish(
        self,
        unit: Unit,
        outcome: Outcome,
        scratch: Path,
        *,
        seconds: float,
        attempt: int,
        reason: str = "",
    ) -> Receipt:
        """Move the outcome's files out of `scratch` into the store; the receipt goes last."""
        self.forget(unit.id)  # while its files are being replaced, it proves nothing
        files = [self._publish_file(scratch / name, name) for name in outcome.files]
        receipt = Receipt(
            unit=unit.id,
            key=unit.key,
            files=(*files, *outcome.adopted),
            num_in=outcome.num_in,
            num_out=outcome.num_out,
            rejects={why: list(keys) for why, keys in outcome.rejects.items() if keys},
            flagged={why: list(keys) for why, keys in outcome.flagged.items() if keys},
            facts=dict(outcome.facts),
            timings=dict(outcome.timings),
            seconds=round(seconds, 3),
            attempt=attempt,
            host=os.uname().nodename,
            reason=reason,
        )
        write_atomically(self._receipt_path(unit.id), dump(receipt.to_json()))
        return receipt

    def holds(self, receipt: Receipt) -> bool:
        """Whether a unit's files are there and as long as its receipt says."""
        for file in receipt.files:
            try:
                if file.place(self.directory).stat().st_size != file.num_bytes:
                    return False
            except FileNotFoundError:
                return False
        return True

    def take_over(self, receipt: Receipt, donor: StageRecord) -> Receipt:
        """Publish what an earlier fingerprint of the stage made under the same key."""
        self.forget(receipt.unit)
        for file in receipt.files:
            if not file.is_adopted:
                duplicate(donor.directory / file.path, self.directory / file.path)
        taken = replace(receipt, taken_from=receipt.taken_from or donor.fingerprint)
        write_atomically(self._receipt_path(receipt.unit), dump(taken.to_json()))
        return taken

    def forget(self, unit_id: str) -> None:
        """Take a unit's receipt back, and the manifest with it: the unit must be done again."""
        (self.directory / "manifest.json").unlink(missing_ok=True)
        self._receipt_path(unit_id).unlink(missing_ok=True)

    def complete(
        self,
        stage: str,
        identity: Json,
        inputs: Mapping[str, str],
        input_contents: Mapping[str, str],
        unit_ids: Iterable[str],
        run_id: str,
    ) -> Manifest:
        """Write the manifest. Every unit must have its receipt; nothing is held in memory."""
        digest, totals = hashlib.sha256(), Totals()
        seconds, timings = 0.0, _Timings()
        with self._gathering() as gathered:
            with gathered.open("wb") as stream:
                for unit_id in unit_ids:
                    receipt = self.receipt(unit_id)
                    assert receipt is not None, f"{stage}: unit {unit_id} has no receipt"
                    line = canonical(receipt.proof()) + b"\n"
                    digest.update(line)
                    stream.write(line)
                    totals = totals.plus(receipt)
                    seconds += receipt.seconds
                    timings.add(receipt.timings)
            publish(gathered, self.directory / RECEIPTS_FILE)
        manifest = Manifest(
            stage=stage,
            fingerprint=self.fingerprint,
            directory=self.directory,
            identity=identity,
            inputs=dict(inputs),
            input_contents=dict(input_contents),
            contents=digest.hexdigest(),
            totals=totals,
            run_id=run_id,
            created=now(),
            seconds=round(seconds, 3),
            timings=timings.summary(),
        )
        write_atomically(self.directory / CIRCUMSTANCES_FILE, dump(manifest.circumstances()))
        write_atomically(self.directory / "manifest.json", dump(manifest.to_json()))
        return manifest

    @contextmanager
    def _gathering(self) -> Iterator[Path]:
        """A hidden local file that `publish` can move into this folder."""
        folder = self.directory if isinstance(self.directory, Path) else Path(tempfile.gettempdir())
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f".{RECEIPTS_FILE}.{uuid.uuid4().hex}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _receipt_path(self, unit_id: str) -> Location:
        return self.directory / "receipts" / f"{unit_id}.json"

    def _publish_file(self, source: Path, name: str) -> File:
        file = File(path=name, sha256=file_sha256(source), num_bytes=source.stat().st_size)
        publish(source, self.directory / name)
        return file


class _Timings:
    """Sums timings over units; fractions and rates are averaged."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: Counter[str] = Counter()

    def add(self, timings: Mapping[str, float]) -> None:
        for name, value in timings.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] += 1

    def summary(self) -> dict[str, float]:
        return {name: round(self._total(name), 4) for name in self._sums}

    def _total(self, name: str) -> float:
        is_averaged = name.endswith(("_fraction", "_per_s"))
        return self._sums[name] / (self._counts[name] if is_averaged else 1)
