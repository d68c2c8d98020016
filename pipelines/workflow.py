"""One `ediffi run` from recipe to record: plan, leave at once if all is there, else drive Ray."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from pipelines import lease, pulse, unit_log_file, webhook
from pipelines.errors import Damaged, RetryableError, StageFailed, UserError
from pipelines.jobs import JOB_VARIABLE
from pipelines.ledger import Ledger
from pipelines.masking import mask
from pipelines.outages import as_retryable
from pipelines.planning import PlannedStage, plan
from pipelines.processes import Owner, process_start, process_table
from pipelines.recipe import CacheRecipe
from pipelines.stage import Json, keep_folders_in
from pipelines.stage_record import now
from pipelines.stage_rows import hit_row, stage_rows
from pipelines.stopping import Interruption, StopMark

Busy = Literal["wait", "leave"]  # for a stage that another run works on


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
    process_started: float = field(default_factory=process_start)
    process_table: str = ""  # which one `pid` is of; "": an earlier version noted none
    planned: dict[str, str] = field(default_factory=dict)  # stage -> fingerprint, from the start
    stages: list[Json] = field(default_factory=list)
    tracking_uri: str = ""
    mlflow_run_id: str = ""
    mlflow_missed: int = 0  # calls; what it left open there is closed by the next run
    error: str = ""
    job: str = field(default_factory=lambda: os.environ.get(JOB_VARIABLE, ""))  # that it is of

    def __post_init__(self) -> None:
        if not self.run_id:
            stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
            self.run_id = f"{self.recipe}-{stamp}-{secrets.token_hex(2)}"

    @classmethod
    def read(cls, document: Json) -> RunRecord:
        """A record from the store.

        Raises:
            Damaged: this version does not know its fields.
        """
        try:
            return cls(**document)
        except TypeError as error:
            raise Damaged(
                f"runs/{document['run_id']}.json: another version of ediffi wrote this record "
                f"({error}); use that version, or move the file out of the store: no stage "
                "depends on it"
            ) from error

    @property
    def owner(self) -> Owner:
        """The run's driver."""
        return Owner(self.run_id, self.host, self.pid, self.process_started, self.process_table)

    @property
    def is_orphan(self) -> bool:
        """Whether the run's driver ran on this machine and is gone."""
        return self.state == "running" and self.owner.is_gone


def is_dead(ledger: Ledger, record: RunRecord) -> bool:
    """Whether a run that is noted as running has lost its driver, wherever that ran."""
    if record.state != "running" or record.is_orphan:
        return record.is_orphan
    is_elsewhere = (record.host, record.process_table) != (socket.gethostname(), process_table())
    return is_elsewhere and pulse.is_silent(ledger.store, record.run_id)


def is_driven(ledger: Ledger, run_id: str) -> bool:
    """Whether a run is under way, as far as can be seen from here."""
    try:
        record = RunRecord.read(ledger.record_of(run_id))
    except FileNotFoundError:
        return False
    return record.state == "running" and not is_dead(ledger, record)


def run_recipe(
    recipe: CacheRecipe,
    ledger: Ledger,
    *,
    selected: Sequence[str] = (),
    retry: Mapping[str, frozenset[str]] | None = None,
    tracking_uri: str = "",
    busy: Busy = "wait",
) -> RunRecord:
    """Bring every selected stage, and all it needs, to its manifest.

    Args:
        retry: by selected stage, units to do again although they have a receipt.
        busy: what to do about a stage that another run works on.

    Returns:
        The finished record.

    Raises:
        UserError: the recipe or the store does not allow it.
        StageFailed: units failed for good; the record says so too.
        RetryableError: the process was told to end, the store failed, or another run works on a
            stage and we do not wait; the same command goes on from there.
        KeyboardInterrupt: the same, by Ctrl-C.
    """
    record = RunRecord(
        recipe=recipe.name,
        resolved=recipe.model_dump(mode="json"),
        process_table=process_table(),
    )
    keep_folders_in(ledger.local_scratch_of(record.run_id))
    start = time.monotonic()
    try:
        with as_retryable(ledger.store, "planning"):
            planned = select(plan(recipe, ledger), selected)
        record.planned = {one.name: one.fingerprint for one in planned}
        with as_retryable(ledger.store, f"run {record.run_id}"):
            if not retry and all(one.is_hit for one in planned):
                record.stages = [hit_row(one) for one in planned]
                _close_what_was_killed(recipe, ledger, tracking_uri)
            else:
                with Interruption() as wish:
                    _drive(recipe, ledger, planned, record, tracking_uri, retry or {}, busy, wish)
        record.state = "finished"
    except BaseException as error:
        record.state = "failed" if isinstance(error, StageFailed | UserError) else "stopped"
        record.error = mask(str(error))
        if isinstance(error, StageFailed | RetryableError):
            error.record = vars(record)
        try:
            _end(ledger, record, start)
        except Exception as second:  # a store that failed once fails again: tell the cause
            _say(str(second) or type(second).__name__)
        raise
    _end(ledger, record, start)
    return record


def _end(ledger: Ledger, record: RunRecord, start: float) -> None:
    """Write the record of a run that is over; it shows no longer that it lives.

    Unless MLflow has not heard all: what showed it then says that something is to be closed there.
    """
    record.ended, record.seconds = now(), round(time.monotonic() - start, 3)
    try:
        with as_retryable(ledger.store, f"writing the record of run {record.run_id}"):
            ledger.write_run(vars(record))
            if not record.mlflow_missed:
                pulse.clear(ledger.store, record.run_id)
    except RetryableError as error:
        record.error, error.record = record.error or mask(str(error)), vars(record)
        raise
    finally:
        # of one that found all finished there is nothing to tell
        if record.tracking_uri or record.state != "finished":
            webhook.tell(vars(record), _say)


def _say(text: str) -> None:
    print(f"ediffi: {mask(text)}", file=sys.stderr)


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
    busy: Busy,
    interruption: Interruption,
) -> None:
    """Start Ray and MLflow and run what is missing."""
    from pipelines.progress import Progress
    from pipelines.ray_cluster import disconnect
    from pipelines.runner import Runner
    from pipelines.stage_jobs import StageJobs
    from pipelines.tracking import Tracker
    from pipelines.tracking_end import close_run, tracking_uri_of
    from pipelines.tracking_place import without_password

    uri = tracking_uri_of(ledger, tracking_uri)
    record.tracking_uri = without_password(uri)
    close_orphans(ledger)
    alive = pulse.begin(ledger.store, record.owner)
    ledger.write_run(vars(record))
    tracker = Tracker(uri, store=ledger.store, recipe_name=recipe.name, run_id=record.run_id)
    tracker.run_started(record.resolved)
    status = "FAILED"
    # stdout is data: Ray's own processes would print there
    with redirect_stdout(sys.stderr), Progress() as progress:
        runner = Runner(
            recipe,
            ledger,
            planned,
            run_id=record.run_id,
            tracker=tracker,
            progress=progress,
            retry=retry,
            interruption=interruption,
            owner=record.owner,
            busy=busy,
            stage_jobs=StageJobs(
                recipe,
                ledger,
                run_id=record.run_id,
                say=progress.say,
                tracking_uri=uri,
                is_driven=lambda run_id: is_driven(ledger, run_id),
            ),
        )
        try:
            progress.say(f"run {record.run_id}: starting Ray")
            _start_ray(interruption)
            runner.run()
            status = "FINISHED"
        except (KeyboardInterrupt, RetryableError):
            status = "KILLED"
            raise
        finally:
            record.stages = stage_rows(runner.states.values())
            problems = _take_every(
                (
                    disconnect,
                    alive.release,
                    lambda: unit_log_file.recover(ledger.store, progress.say),
                    lambda: ledger.discard_scratch_of(record.run_id),
                    lambda: close_run(ledger, tracker, status, record, progress.say),
                ),
                progress.say,
            )
        if problems:
            raise problems[0]


def _start_ray(interruption: Interruption) -> None:
    """Connect to Ray, unless the run was told to end; Ray takes SIGTERM for itself as it starts."""
    from pipelines.ray_cluster import connect

    interruption.obey()
    try:
        connect()
    except SystemExit as error:  # Ray's answer to SIGTERM
        raise RetryableError("told to end (SIGTERM); run the same command to go on") from error
    finally:
        interruption.listen()
    interruption.obey()


def _take_every(
    steps: Sequence[Callable[[], object]], say: Callable[[str], None]
) -> list[Exception]:
    """Take steps that end a run, each whatever became of the others; tells and returns failures."""
    problems = []
    for step in steps:
        try:
            step()
        except Exception as error:  # the run may have one of its own, which must not be hidden
            say(f"at the run's end: {type(error).__name__}: {error}")
            problems.append(error)
    return problems


def _close_what_was_killed(recipe: CacheRecipe, ledger: Ledger, tracking_uri: str) -> None:
    """For a run that starts nothing: look for drivers killed after their last stage.

    Where there is none, which is nearly always, this costs a look into a folder.
    """
    if not pulse.run_ids(ledger.store):
        return
    from pipelines.tracking_end import close_killed

    close_orphans(ledger)
    close_killed(recipe, ledger, tracking_uri)


def close_orphans(ledger: Ledger) -> list[str]:
    """Mark runs whose driver is gone as killed; clear what they left in flight. Returns ids."""
    records = [RunRecord.read(record) for record in ledger.runs()]
    killed = [record for record in records if is_dead(ledger, record)]
    for record in killed:
        record.state, record.ended = "killed", now()
        ledger.write_run(vars(record))
        for name, fingerprint in record.planned.items():
            lease.let_go_of(ledger.stage(name, fingerprint).directory, record.run_id)
        StopMark(ledger.store, record.run_id).remove()
    running = {record.run_id for record in records if record.state == "running"}
    for name in orphaned_scratch(ledger, running, {record.run_id for record in records}):
        ledger.discard_scratch_of(name)
    return [record.run_id for record in killed]


def orphaned_scratch(
    ledger: Ledger, running: AbstractSet[str], known: AbstractSet[str]
) -> list[str]:
    """Folders of work in flight that no run is at.

    Args:
        running: ids of runs under way; as long as there are any, what is nobody's stays.
        known: ids of all runs.
    """
    names = ledger.scratch_names() - running
    return sorted(names if not running else names & known)
