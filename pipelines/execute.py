"""Doing one unit: the same code on a pool worker, in a training gang and in a test.

A `Task` is small enough to send to any node; the worker opens the ledger by itself and publishes
what it made, so a driver that dies meanwhile loses nothing that was published.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.ledger import Ledger, StageRecord
from pipelines.stage import Json, Receipt, Stage, Unit, Workspace

PROGRESS_FILE = "progress.jsonl"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One unit of one stage, with the addresses of all it reads."""

    store: Path
    stage: Stage
    fingerprint: str
    inputs: Mapping[str, str]
    unit: Unit
    attempt: int = 1
    device: str = "cpu"

    @property
    def record(self) -> StageRecord:
        return Ledger(self.store).stage(self.stage.name, self.fingerprint)

    @property
    def progress_path(self) -> Path:
        return self.record.durable_path(self.unit.id) / PROGRESS_FILE


def execute(
    task: Task,
    *,
    rank: int = 0,
    world_size: int = 1,
    tell: Callable[[Mapping[str, float]], None] = lambda row: None,
) -> Receipt | None:
    """Run the unit and publish it. In a gang every rank runs, rank 0 publishes.

    Args:
        tell: also given every row that the unit reports, on every rank.

    Returns:
        The receipt (also when the unit was done already), None on ranks other than 0.
    """
    ledger, record = Ledger(task.store), task.record
    if (receipt := record.receipt(task.unit)) is not None:
        return receipt
    durable = record.durable_path(task.unit.id)
    durable.mkdir(parents=True, exist_ok=True)
    scratch = ledger.new_scratch()
    start = time.monotonic()

    def report(row: Mapping[str, float]) -> None:
        if rank == 0:
            with task.progress_path.open("a") as stream:
                # The newline goes first: a row that a killed attempt tore stands alone.
                stream.write("\n" + json.dumps(row))
        tell(row)

    workspace = Workspace(
        scratch=scratch,
        durable=durable,
        inputs={
            name: ledger.stage(name, address).manifest() for name, address in task.inputs.items()
        },
        attempt=task.attempt,
        device=task.device,
        rank=rank,
        world_size=world_size,
        report=report,
    )
    try:
        outcome = task.stage.run(task.unit, workspace)
        if rank != 0:
            return None
        seconds = time.monotonic() - start
        return record.publish(task.unit, outcome, scratch, seconds=seconds, attempt=task.attempt)
    finally:
        ledger.discard_scratch(scratch)


def read_progress(path: Path) -> list[dict[str, Json]]:
    """The rows a unit reported, without those that a resumed attempt has overtaken.

    A row that was being written when its worker died is left out.
    """
    rows: list[dict[str, Json]] = []
    if not path.exists():
        return rows
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        while rows and "images" in row and rows[-1].get("images", -1) >= row["images"]:
            rows.pop()
        rows.append(row)
    return rows
