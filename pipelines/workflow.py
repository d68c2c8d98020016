"""One `ediffi run` from recipe to record: plan, leave at once if all is there, else drive Ray."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import psutil

from pipelines.errors import RetryableError, StageFailed, UserError
from pipelines.ledger import Ledger
from pipelines.location import remove_tree
from pipelines.planning import PlannedStage, plan
from pipelines.recipe import CacheRecipe
from pipelines.stage import Json
from pipelines.stage_record import now
from pipelines.stopping import Interruption, StopMark

if TYPE_CHECKING:
    from pipelines.runner import Runner
    from pipelines.tracking import Tracker


@dataclass
class RunRecord:
    """What a run did; kept in the store as `runs/<run_id>.json`."""

    recipe: str
    resolved: Json
    run_id: str = ""
    state: str = "running"  # running | finished | failed | stopped | killed
    started: str = field(default_factory=now)
    ended: str = ""
    seconds: float = 0.0
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    process_started: float = field(default_factory=lambda: psutil.Process().create_time())
    planned: dict[str, str] = field(default_factory=dict)  # stage -> fingerprint, from the start
    stages: list[Json] = field(default_factory=list)
    tracking_uri: str = ""
    mlflow_run_id: str = ""
    error: str = ""

    def __post_init__(self) -> None:
        if not self.run_id:
            stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
            self.run_id = f"{self.recipe}-{stamp}-{secrets.token_hex(2)}"

    @property
    def is_orphan(self) -> bool:
        """Whether the run's driver ran on this machine and is gone."""
        if self.state != "running" or self.host != socket.gethostname():
            return False
        try:
            return psutil.Process(self.pid).create_time() != self.process_started
        except psutil.NoSuchProcess:
            return True


def run_recipe(
    recipe: CacheRecipe,
    ledger: Ledger,
    *,
    selected: Sequence[str] = (),
    retry: Mapping[str, frozenset[str]] | None = None,
    tracking_uri: str = "",
) -> RunRecord:
    """Bring every selected stage, and all it needs, to its manifest.

    Args:
        retry: by selected stage, units to do again although they have a receipt.

    Returns:
        The finished record.

    Raises:
        UserError: the recipe or the store does not allow it.
        StageFailed: units failed for good; the record says so too.
        RetryableError: the process was told to end; the same command goes on from there.
        KeyboardInterrupt: the same, by Ctrl-C.
    """
    planned = select(plan(recipe, ledger), selected)
    record = RunRecord(
        recipe=recipe.name,
        resolved=recipe.model_dump(mode="json"),
        planned={one.name: one.fingerprint for one in planned},
    )
    start = time.monotonic()
    try:
        if not retry and all(one.is_hit for one in planned):
            record.stages = [_hit(one) for one in planned]
        else:
            _drive(recipe, ledger, planned, record, tracking_uri, retry or {})
        record.state = "finished"
    except BaseException as error:
        record.state = "failed" if isinstance(error, StageFailed | UserError) else "stopped"
        record.error = str(error)
        raise
    finally:
        record.ended, record.seconds = now(), round(time.monotonic() - start, 3)
        ledger.write_run(vars(record))
    return record


def select(planned: list[PlannedStage], selected: Sequence[str]) -> list[PlannedStage]:
    """The chosen stages with all they need; `embed` chooses every `embed/...`; () is all."""
    if not selected:
        return planned
    by_name = {one.name: one for one in planned}
    wanted: set[str] = set()
    for choice in selected:
        found = {name for name in by_name if choice in (name, name.split("/")[0])}
        if not found:
            raise UserError(f"no stage {choice!r} in this recipe; it has: {', '.join(by_name)}")
        wanted |= found
    for one in reversed(planned):
        if one.name in wanted:
            wanted |= set(one.stage.needs)
    return [one for one in planned if one.name in wanted]


def _drive(
    recipe: CacheRecipe,
    ledger: Ledger,
    planned: list[PlannedStage],
    record: RunRecord,
    tracking_uri: str,
    retry: Mapping[str, frozenset[str]],
) -> None:
    """Start Ray and MLflow and run what is missing."""
    from pipelines.progress import Progress
    from pipelines.ray_cluster import connect
    from pipelines.runner import Runner
    from pipelines.tracking import Tracker, default_uri, without_password

    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "") or default_uri(ledger.store)
    record.tracking_uri = without_password(uri)
    killed = close_orphans(ledger)
    ledger.write_run(vars(record))
    tracker = Tracker(uri, store=ledger.store, recipe_name=recipe.name, run_id=record.run_id)
    tracker.run_started(record.resolved, killed)
    status = "FAILED"
    # stdout is data: Ray's own processes would print there
    with redirect_stdout(sys.stderr), Progress() as progress:
        interruption = Interruption()
        runner = Runner(
            recipe,
            ledger,
            planned,
            run_id=record.run_id,
            tracker=tracker,
            progress=progress,
            retry=retry,
            interruption=interruption,
        )
        try:
            progress.say(f"run {record.run_id}: starting Ray")
            connect()
            with interruption:  # from here on: Ray takes SIGTERM for itself when it starts
                runner.run()
            status = "FINISHED"
        except (KeyboardInterrupt, RetryableError):
            status = "KILLED"
            raise
        finally:
            record.stages = stage_rows(runner)
            _disconnect()
            _close(tracker, status, record, progress.say)


def _close(tracker: Tracker, status: str, record: RunRecord, say: Callable[[str], None]) -> None:
    tracker.run_finished(status)
    record.mlflow_run_id = tracker.parent_run_id
    if tracker.errors:
        say(
            f"MLflow at {record.tracking_uri} missed {len(tracker.errors)} calls, the first: "
            f"{tracker.errors[0]}; the store holds everything"
        )


def _disconnect() -> None:
    import ray

    ray.shutdown()


def close_orphans(ledger: Ledger) -> list[str]:
    """Mark runs whose driver is gone as killed; clear what they left in flight. Returns ids."""
    records = [RunRecord(**record) for record in ledger.runs()]
    killed = [record for record in records if record.is_orphan]
    for record in killed:
        record.state, record.ended = "killed", now()
        ledger.write_run(vars(record))
        StopMark(ledger.store, record.run_id).remove()
    if not any(record.state == "running" for record in records):
        remove_tree(ledger.store / ".scratch")
    return [record.run_id for record in killed]


def stage_rows(runner: Runner) -> list[Json]:
    """A row for every stage that ran, was found or failed."""
    rows = []
    for state in runner.states.values():
        planned = state.planned
        if state.state == "cached":
            rows.append(_hit(planned))
        elif state.state in {"ran", "failed", "running"}:
            rows.append(
                {
                    "name": planned.name,
                    "fingerprint": planned.fingerprint,
                    "state": "ran" if state.state == "ran" else "failed",
                    "seconds": round(state.seconds, 3),
                    "units": state.num_units,
                    "path": str(planned.record.directory),
                }
            )
    return rows


def _hit(planned: PlannedStage) -> Json:
    return {
        "name": planned.name,
        "fingerprint": planned.fingerprint,
        "state": "cached",
        "seconds": 0.0,
        "units": planned.record.manifest().num_units,
        "path": str(planned.record.directory),
    }
