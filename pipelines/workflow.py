"""One `ediffi run` from recipe to record: plan, leave at once if all is there, else drive Ray."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipelines import webhook
from pipelines.driver.stage_rows import hit_row, stage_rows
from pipelines.errors import RetryableError, StageFailed, UserError
from pipelines.masking import mask
from pipelines.planning import PlannedStage, plan
from pipelines.recipe import CacheRecipe
from pipelines.run_record import RunRecord, close_orphans, is_driven
from pipelines.stage import keep_folders_in
from pipelines.store import pulse
from pipelines.store.ledger import Ledger
from pipelines.store.outages import as_retryable
from pipelines.store.processes import process_table
from pipelines.store.stage_record import now
from pipelines.store.stopping import Interruption
from pipelines.tracking.place import without_password
from pipelines.tracking.run_end import close_killed, close_run, tracking_uri_of
from pipelines.worker import unit_log_file

if TYPE_CHECKING:
    from pipelines.driver.progress import Progress
    from pipelines.driver.runner import Runner
    from pipelines.store.lease import Lease
    from pipelines.tracking.tracker import Tracker

Busy = Literal["wait", "leave"]  # for a stage that another run works on


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
                    _Drive(
                        recipe=recipe,
                        ledger=ledger,
                        planned=planned,
                        record=record,
                        uri=tracking_uri_of(ledger, tracking_uri),
                        retry=retry or {},
                        busy=busy,
                        interruption=wish,
                    ).go()
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


@dataclass(frozen=True, kw_only=True)
class _Drive:
    """A run that starts Ray and MLflow and does what is missing."""

    recipe: CacheRecipe
    ledger: Ledger
    planned: list[PlannedStage]
    record: RunRecord
    uri: str  # of MLflow
    retry: Mapping[str, frozenset[str]]
    busy: Busy
    interruption: Interruption

    def go(self) -> None:
        """Bring the run to its end, and take down what was started for it."""
        from pipelines.driver.progress import Progress

        self.record.tracking_uri = without_password(self.uri)
        close_orphans(self.ledger)
        alive = pulse.begin(self.ledger.store, self.record.owner)
        self.ledger.write_run(vars(self.record))
        tracker = self._tracker()
        status = "FAILED"
        # stdout is data: Ray's own processes would print there
        with redirect_stdout(sys.stderr), Progress() as progress:
            runner = self._runner(tracker, progress)
            try:
                progress.say(f"run {self.record.run_id}: starting Ray")
                _start_ray(self.interruption)
                runner.run()
                status = "FINISHED"
            except (KeyboardInterrupt, RetryableError):
                status = "KILLED"
                raise
            finally:
                self.record.stages = stage_rows(runner.states.values())
                problems = self._end(tracker, status, alive, progress.say)
            if problems:
                raise problems[0]

    def _tracker(self) -> Tracker:
        import ray  # noqa: F401  # first: beside MLflow's own imports it would take twice as long

        from pipelines.tracking.tracker import Tracker

        tracker = Tracker(
            self.uri,
            store=self.ledger.store,
            recipe_name=self.recipe.name,
            run_id=self.record.run_id,
        )
        tracker.run_started(self.record.resolved)
        return tracker

    def _runner(self, tracker: Tracker, progress: Progress) -> Runner:
        from pipelines.driver.runner import Runner
        from pipelines.jobs.stage_jobs import StageJobs

        return Runner(
            self.recipe,
            self.ledger,
            self.planned,
            run_id=self.record.run_id,
            tracker=tracker,
            progress=progress,
            retry=self.retry,
            interruption=self.interruption,
            owner=self.record.owner,
            busy=self.busy,
            stage_jobs=StageJobs(
                self.recipe,
                self.ledger,
                run_id=self.record.run_id,
                say=progress.say,
                tracking_uri=self.uri,
                is_driven=lambda run_id: is_driven(self.ledger, run_id),
            ),
        )

    def _end(
        self, tracker: Tracker, status: str, alive: Lease, say: Callable[[str], None]
    ) -> list[Exception]:
        """Take down what was started; what went wrong meanwhile."""
        from pipelines.driver.ray_cluster import disconnect

        return _take_every(
            (
                disconnect,
                alive.release,
                lambda: unit_log_file.recover(self.ledger.store, say),
                lambda: close_run(self.ledger, tracker, status, self.record, say),
                # last: MLflow's tables may still be in the making there
                lambda: self.ledger.discard_scratch_of(self.record.run_id),
            ),
            say,
        )


def _start_ray(interruption: Interruption) -> None:
    """Connect to Ray, unless the run was told to end; Ray takes SIGTERM for itself as it starts."""
    from pipelines.driver.ray_cluster import connect

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
    close_orphans(ledger)
    close_killed(recipe, ledger, tracking_uri)
