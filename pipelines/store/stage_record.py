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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pipelines.errors import Damaged, RetryableError
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
from pipelines.store import lease
from pipelines.store.fingerprint import canonical, file_sha256
from pipelines.store.location import (
    Location,
    create_exclusively,
    duplicate,
    names_in,
    publish,
    read_text,
    remove_tree,
    write_atomically,
)
from pipelines.store.stage_names import DURABLE_FOLDER, check_file_name
from pipelines.store.unit_timings import UnitTimings


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
    def is_begun(self) -> bool:
        """Whether it was noted what this folder stands for: no unit is done before that."""
        return (self.directory / "identity.json").exists()

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
        noted = self.noted()
        if noted is not None:
            if noted["input_contents"] == dict(input_contents):
                return self.is_trusted(input_contents)
            (self.directory / "manifest.json").unlink(missing_ok=True)
            remove_tree(self.directory / DURABLE_FOLDER)
        is_new = noted is None and not self.done_units()  # else somebody removed what was noted
        document = {"identity": identity, "input_contents": dict(input_contents)}
        write_atomically(path, dump({**document, "is_trusted": is_new}))
        return is_new

    def is_trusted(self, input_contents: Mapping[str, str]) -> bool:
        """Whether all receipts here were made from these contents, without a look at their keys."""
        noted = self.noted() or {"input_contents": None}
        return noted["input_contents"] == dict(input_contents) and bool(noted.get("is_trusted"))

    def noted(self) -> Json:
        """What `open` wrote; None if it never did.

        Raises:
            Damaged: it is half there, or something else wrote it.
        """
        path = self.directory / "identity.json"
        try:
            noted = json.loads(read_text(path))
            _ = noted["identity"].items(), noted["input_contents"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(
                f"{path}: must say what this stage stands for, found something else ({error}); "
                "remove this file and run again: every unit's receipt is then judged by its key"
            ) from error
        return noted

    def receipt(self, unit_id: str) -> Receipt | None:
        """The unit's receipt, or None if it is not done.

        An empty file is none: its writer died, see `location.create_exclusively`.

        Raises:
            Damaged: the file is no receipt.
        """
        path = self._receipt_path(unit_id)
        try:
            text = read_text(path)
            return Receipt.from_json(json.loads(text)) if text else None
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged(
                f"{path}: must be the receipt of a unit, found something else ({error}); "
                "`ediffi cache repair` makes the unit again"
            ) from error

    def demand_receipt(self, unit_id: str) -> Receipt:
        """The receipt of a unit that has been done.

        Raises:
            RetryableError: it is gone.
            Damaged: the file is no receipt.
        """
        receipt = self.receipt(unit_id)
        if receipt is None:
            raise RetryableError(
                f"{self._receipt_path(unit_id)}: unit {unit_id} was done, but its receipt is not "
                "there any more; run the same command: it does the unit again"
            )
        return receipt

    def done_units(self) -> set[str]:
        """Ids of all units that have a receipt."""
        folder = self.directory / "receipts"
        names = (name for name in names_in(folder) if name.endswith(".json"))
        return {name.removesuffix(".json") for name in names if _has_text(folder / name)}

    def durable_path(self, unit_id: str) -> Location:
        return self.directory / DURABLE_FOLDER / unit_id

    def publish(
        self,
        unit: Unit,
        outcome: Outcome,
        scratch: Path,
        *,
        seconds: float,
        attempt: int,
        reason: str = "",
        token: int = 0,
    ) -> Receipt:
        """Move the outcome's files out of `scratch` into the store; the receipt goes last.

        It is looked whether the lease still holds before anything is replaced, before every file
        and before the receipt. A worker that is stopped between a look and the write after it can
        still replace one file, or take one receipt back, that the next driver has made meanwhile.
        Its own receipt comes through only before the next driver's, which then replaces it. So
        what can remain is a unit to be done again, or a file that differs from its receipt if the
        work does not give equal bytes; `ediffi cache verify` finds that, and `repair` mends it.

        Args:
            token: of the driver's lease; 0 where nobody guards the stage.

        Raises:
            Fenced: another driver or attempt has taken the unit over.
            UserError: a file would lie outside the folder, or where the stage keeps its own.
        """
        for name in outcome.files:
            check_file_name(unit.id, name)
        lease.check(self.directory, token, unit.id, attempt)
        self.forget(unit.id)  # while its files are being replaced, it proves nothing
        files = []
        for name in outcome.files:
            lease.check(self.directory, token, unit.id, attempt)
            files.append(self._publish_file(scratch / name, name))
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
        self._write_receipt(receipt, token, attempt)
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

    def take_over(
        self, receipt: Receipt, donor: StageRecord, *, token: int = 0, attempt: int = 0
    ) -> Receipt:
        """Publish what an earlier fingerprint of the stage made under the same key.

        Raises:
            Fenced: another driver or attempt has taken the unit over.
        """
        lease.check(self.directory, token, receipt.unit, attempt)
        self.forget(receipt.unit)
        for file in receipt.files:
            if not file.is_adopted:
                lease.check(self.directory, token, receipt.unit, attempt)
                duplicate(donor.directory / file.path, self.directory / file.path)
        taken = replace(receipt, taken_from=receipt.taken_from or donor.fingerprint)
        self._write_receipt(taken, token, attempt)
        return taken

    def _write_receipt(self, receipt: Receipt, token: int, attempt: int) -> None:
        """Write it where none is; one that came meanwhile is replaced only by who holds the lease.

        A worker that is late has its look at the lease behind it, but finds the receipt of the one
        who took over, and looks again.
        """
        lease.check(self.directory, token, receipt.unit, attempt)
        path, text = self._receipt_path(receipt.unit), dump(receipt.to_json())
        if token and create_exclusively(path, text):
            return
        lease.check(self.directory, token, receipt.unit, attempt)
        write_atomically(path, text)

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
        token: int = 0,
    ) -> Manifest:
        """Write the manifest. Every unit must have its receipt; nothing is held in memory.

        Raises:
            Fenced: another driver has taken the stage over.
            RetryableError: a receipt is gone.
        """
        lease.check(self.directory, token)
        digest, totals = hashlib.sha256(), Totals()
        seconds, timings = 0.0, UnitTimings()
        with self._gathering() as gathered:
            with gathered.open("wb") as stream:
                for unit_id in unit_ids:
                    receipt = self.demand_receipt(unit_id)
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
        lease.check(self.directory, token)
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


def _has_text(path: Location) -> bool:
    """Whether a receipt is more than a name. In a bucket it always is, and no look is made."""
    try:
        return not isinstance(path, Path) or path.stat().st_size > 0
    except FileNotFoundError:
        return False  # it was taken back
