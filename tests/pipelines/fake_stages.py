"""Stages without pictures: small enough to run in every test, on Ray too."""

import json
import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pipelines.planning import PlannedStage, describe
from pipelines.stage import Json, Manifest, Outcome, Receipt, Unit, Workspace
from pipelines.store.ledger import Ledger
from pipelines.store.location import write_atomically
from pipelines.store.stage_record import StageRecord


@dataclass(frozen=True, kw_only=True)
class FakeStage:
    """Writes one text file a unit.

    Args:
        setting: the only thing that enters the fingerprint.
        behaviour: by unit, what it does instead: `fails`, `refuses` its input (ValueError),
            `refuses as user` (UserError), `is cut off` (RetryableError), `dies` together with its
            process; `fails once` and `dies once` go well at the second attempt;
            `reads first` looks at the manifest of the stage `first`; `trains once` and `trains`
            keep state and end when asked to, `is deaf` ends by a file `enough`;
            `warns` logs what training would.
        keys: by unit, what decides its bytes.
    """

    name: str
    needs: tuple[str, ...] = ()
    units: tuple[str, ...] = ("a",)
    setting: Json = 0
    behaviour: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    version: ClassVar[int] = 1
    gang: ClassVar[bool] = False

    def identity(self) -> Json:
        return {"setting": self.setting}

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        return [Unit(id=unit, key=self.keys.get(unit, "")) for unit in self.units]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        with (workspace.durable / "attempts").open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        self._misbehave(unit.id, is_first=workspace.attempt == 1)
        if self.behaviour.get(unit.id) == "reads first":
            _ = workspace.inputs["first"].receipts
        self._train(unit.id, workspace)
        for images in (1, 2):
            workspace.report({"images": images, "loss": 1 / images})
        (workspace.scratch / f"{unit.id}.txt").write_text(f"{self.name}/{unit.id}")
        (workspace.scratch / "left-over.txt").write_text("not named in the outcome")
        return Outcome(files=[f"{unit.id}.txt"], num_in=2, num_out=1, rejects={"odd": ["k"]})

    def _train(self, unit_id: str, workspace: Workspace) -> None:
        """Go on until told to end; a unit that has a saved state is nearly done."""
        behaviour, saved = self.behaviour.get(unit_id, ""), workspace.durable / "saved"
        if behaviour == "warns":
            logging.getLogger("ediffi.train.checkpoint").warning("one is damaged")
        while behaviour == "is deaf" and not (workspace.durable / "enough").exists():
            time.sleep(0.05)
        if behaviour == "trains" or (behaviour == "trains once" and not saved.exists()):
            with _sigterm() as is_told:
                (workspace.durable / "trains").touch()
                while not (workspace.should_stop() or is_told):
                    time.sleep(0.05)
            saved.touch()
            from ediffi.train.stop import Stopped  # imports torch

            raise Stopped(7)

    def _misbehave(self, unit_id: str, *, is_first: bool) -> None:
        from pipelines.errors import RetryableError, UserError

        match self.behaviour.get(unit_id, "works"):
            case "fails":
                raise RuntimeError(f"{unit_id} is broken")
            case "fails once" if is_first:
                raise RuntimeError(f"{unit_id} is unlucky")
            case "dies once" if is_first:
                os._exit(1)
            case "dies":
                os._exit(1)
            case "is cut off":
                raise RetryableError("no address could be reached")
            case "refuses":
                raise ValueError(f"{unit_id} has a wrong input")
            case "refuses as user":
                raise UserError(f"{unit_id} has a wrong input") from OSError("an inner reason")


@dataclass(frozen=True, kw_only=True)
class FakeTraining(FakeStage):
    """A stage whose units can stop."""

    gang: ClassVar[bool] = True


@contextmanager
def _sigterm() -> Iterator[list[int]]:
    """Gets the signals sent to this process, as training by one worker hears them."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        yield heard
    finally:
        signal.signal(signal.SIGTERM, before)


def attempts(record: StageRecord, unit: str) -> list[int]:
    """Process ids of all attempts ever made at a unit."""
    path = record.durable_path(unit) / "attempts"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def receipt(unit: str = "a", **values: Json) -> Receipt:
    """A receipt of nothing, but for what the test says."""
    nothing = {"files": (), "num_in": 0, "num_out": 0, "rejects": {}, "facts": {}}
    proof = {"seconds": 1.5, "attempt": 1, "host": "here"}
    return Receipt(unit=unit, **{**nothing, **proof, **values})


def manifest(directory: Path, *receipts: Receipt, stage: str = "ingest") -> Manifest:
    """A finished stage with these receipts, written to `directory`."""
    record = StageRecord(directory)
    for one in receipts:
        path = directory / "receipts" / f"{one.unit}.json"
        write_atomically(path, json.dumps(one.to_json()))
    units = [one.unit for one in receipts]
    return record.complete(stage, {}, {}, {}, units, "run-1")


def finish(planned: PlannedStage, units: Mapping[str, Mapping[str, str]] | None = None) -> None:
    """Complete a planned stage as if it had run; `units` maps units to files and their text."""
    record = planned.record
    scratch = record.directory / "scratch"
    store = record.directory.parents[planned.name.count("/") + 1]
    contents = {
        name: Manifest.load(store / name / address).contents
        for name, address in planned.inputs.items()
    }
    identity = describe(planned.stage, planned.inputs)
    record.open(identity, contents)
    for unit, files in (units or {}).items():
        for name, text in files.items():
            path = scratch / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        outcome = Outcome(files=list(files), num_in=1, num_out=1)
        record.publish(Unit(id=unit), outcome, scratch, seconds=1.0, attempt=1)
    record.complete(planned.name, identity, planned.inputs, contents, list(units or ()), "run-1")


def finish_all(planned: Sequence[PlannedStage]) -> None:
    """Complete every stage of a plan with no units at all."""
    for one in planned:
        finish(one)


def write_run(ledger: Ledger, run_id: str, **values: Json) -> Json:
    """Write a run's record, finished unless the test says otherwise; returns it."""
    from pipelines.run_record import RunRecord

    record = RunRecord(recipe="demo", resolved={}, run_id=run_id, state="finished")
    document = {**vars(record), **values}
    ledger.write_run(document)
    return document
