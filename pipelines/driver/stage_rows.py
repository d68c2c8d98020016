"""What a run's record says of each stage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pipelines.planning import PlannedStage
from pipelines.stage import Json

if TYPE_CHECKING:
    from pipelines.driver.stage_state import StageState


def stage_rows(states: Iterable[StageState]) -> list[Json]:
    """A row for every stage that ran, was found or failed; asks nothing of the store."""
    rows = []
    for state in states:
        planned = state.planned
        if state.state == "cached":
            rows.append(_found(planned, state.num_units))
        elif state.state in {"ran", "failed", "running"}:
            rows.append(
                {
                    "name": planned.name,
                    "fingerprint": planned.fingerprint,
                    "state": "ran" if state.state == "ran" else "failed",
                    "seconds": round(state.seconds, 3),
                    "units": state.num_units,
                    "worker_seconds": round(state.worker_seconds, 3),
                    "cpus": state.resources.cpus,
                    "gpus": state.resources.gpus,
                    "num_workers": state.num_workers,
                    "path": str(planned.record.directory),
                }
            )
    return rows


def hit_row(planned: PlannedStage) -> Json:
    """The row of a stage that was found finished."""
    return _found(planned, planned.record.manifest().num_units)


def _found(planned: PlannedStage, num_units: int) -> Json:
    return {
        "name": planned.name,
        "fingerprint": planned.fingerprint,
        "state": "cached",
        "seconds": 0.0,
        "units": num_units,
        "path": str(planned.record.directory),
    }
