"""What is done for MLflow when runs are over: this one's figures, and what killed ones left open.

A run that is over but still shows that it lives, see `store.pulse`, has something open where it
was tracked. Only a run that is tracked at the same place can close that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipelines.masking import mask
from pipelines.recipe import CacheRecipe
from pipelines.stage import Json
from pipelines.store import pulse
from pipelines.store.ledger import Ledger
from pipelines.tracking.place import default_uri, without_password

if TYPE_CHECKING:
    from pipelines.run_record import RunRecord
    from pipelines.tracking.tracker import Tracker


def tracking_uri_of(ledger: Ledger, wish: str) -> str:
    """Where a run is tracked: as asked for, as the environment says, else in the store."""
    return wish or os.environ.get("MLFLOW_TRACKING_URI", "") or default_uri(ledger.store)


def close_run(
    ledger: Ledger, tracker: Tracker, status: str, record: RunRecord, say: Callable[[str], None]
) -> None:
    """Close a run in MLflow as `status`, and note what MLflow has not heard."""
    from pipelines.cost import cost_of_run

    tracker.figures(lambda: cost_of_run(ledger, vars(record)).metrics())
    tracker.run_finished(status)
    record.mlflow_run_id, record.mlflow_missed = tracker.parent_run_id, len(tracker.errors)
    if tracker.errors:
        say(
            f"MLflow at {record.tracking_uri} missed {len(tracker.errors)} calls, the first: "
            f"{tracker.errors[0]}; the store holds everything"
        )
        return
    for run_id in ended_with_a_pulse(ledger, record.tracking_uri):
        pulse.clear(ledger.store, run_id)  # it closed those of killed runs when it began


def close_killed(recipe: CacheRecipe, ledger: Ledger, wish: str) -> None:
    """For a run that starts nothing: close what drivers left open that were killed at their end.

    What shows that there was one goes last, so that a second kill hides nothing.
    """
    from pipelines.tracking.tracker import Tracker

    uri = tracking_uri_of(ledger, wish)
    if not (over := ended_with_a_pulse(ledger, without_password(uri))):
        return
    tracker = Tracker(uri, store=ledger.store, recipe_name=recipe.name, run_id="")
    tracker.close_ended()
    tracker.run_finished("FINISHED")
    for problem in tracker.errors:
        words = f"runs that were killed are still open in MLflow: {problem}"
        print(f"ediffi: {mask(words)}", file=sys.stderr)
    for run_id in () if tracker.errors else over:
        pulse.clear(ledger.store, run_id)


def ended_with_a_pulse(ledger: Ledger, shown_uri: str) -> list[str]:
    """Runs that are over but could not clear what showed that they live.

    Args:
        shown_uri: only of runs that were tracked there; it is as a record shows it.
    """
    records = {record["run_id"]: record for record in ledger.runs()}
    return [
        run_id
        for run_id in sorted(pulse.run_ids(ledger.store))
        if _is_over(ledger, run_id, records.get(run_id), shown_uri)
    ]


def _is_over(ledger: Ledger, run_id: str, record: Json | None, shown_uri: str) -> bool:
    if record is None:  # killed before it wrote one, and so before it told MLflow of itself
        return pulse.is_silent(ledger.store, run_id)
    is_tracked_there = record.get("tracking_uri", "") in ("", shown_uri)
    return record["state"] != "running" and is_tracked_there
