"""The driver: a disposable loop that hands units to Ray until every stage has its manifest.

It keeps nothing that matters: what is done stands in the ledger, so killing it at any moment and
running the same command again finishes the work without redoing finished units.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import ray

from pipelines.errors import RetryableError, StageFailed, UserError
from pipelines.execute import Task, read_progress
from pipelines.gang import run_gang
from pipelines.ledger import Ledger
from pipelines.planning import PlannedStage, describe
from pipelines.pool import WorkerPool
from pipelines.progress import Progress
from pipelines.ray_cluster import check_room
from pipelines.recipe import Recipe, Resources
from pipelines.stage import Manifest, Unit
from pipelines.tracking import Tracker

POLL_S = 0.25
PROGRESS_S = 1.0


@dataclass
class StageState:
    """A stage in the loop. `failures` maps a unit that failed for good to what it said."""

    planned: PlannedStage
    resources: Resources
    state: str = "waiting"  # waiting | running | ran | cached | failed | blocked
    units: list[Unit] = field(default_factory=list)
    queue: deque[Task] = field(default_factory=deque)
    num_in_flight: int = 0
    num_reused: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    is_hopeless: bool = False  # a failure lies in the work itself, not in the surroundings
    num_rows_sent: dict[str, int] = field(default_factory=dict)
    started: float = 0.0
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.planned.name

    @property
    def num_workers(self) -> int:
        """Workers of one unit; more than one are gathered by Ray Train."""
        return self.resources.num_workers if self.planned.stage.gang else 1

    @property
    def is_over(self) -> bool:
        return self.state in {"ran", "cached", "failed", "blocked"}

    @property
    def num_done(self) -> int:
        return len(self.units) - len(self.queue) - self.num_in_flight - len(self.failures)


class Runner:
    """Runs the stages that the plan says are missing.

    Args:
        selected: names of the stages to run with all they need; empty: all.
    """

    def __init__(
        self,
        recipe: Recipe,
        ledger: Ledger,
        planned: Sequence[PlannedStage],
        *,
        run_id: str,
        tracker: Tracker,
        progress: Progress,
    ) -> None:
        self._ledger, self._run_id = ledger, run_id
        self._tracker, self._progress = tracker, progress
        self.states = {
            one.name: StageState(planned=one, resources=recipe.resources_of(one.name))
            for one in planned
        }
        self._manifests: dict[str, Manifest] = {}
        self._in_flight: dict[ray.ObjectRef, tuple[StageState, Task]] = {}
        self._pool = WorkerPool()
        self._next_progress = 0.0

    def run(self) -> None:
        """Run until every stage is over.

        Raises:
            StageFailed: a stage failed; names it, its units and what each said.
            RetryableError: the same, when nothing but the surroundings failed.
            UserError: a stage asks for more than the cluster has.
        """
        for state in self.states.values():
            if not state.planned.is_hit:
                check_room(state.name, state.resources, state.num_workers)
        while not all(state.is_over for state in self.states.values()):
            self._start_ready_stages()
            self._dispatch()
            self._collect()
            self._show_progress()
        self._show_progress(force=True)
        self._raise_failures()

    # -- stages ----------------------------------------------------------------------------------

    def _start_ready_stages(self) -> None:
        for state in self.states.values():
            if state.state == "waiting":
                needs = [self.states[name] for name in state.planned.stage.needs]
                if any(need.state in {"failed", "blocked"} for need in needs):
                    state.state = "blocked"
                elif all(need.state in {"ran", "cached"} for need in needs):
                    self._start(state)

    def _start(self, state: StageState) -> None:
        planned = state.planned
        if planned.record.is_complete:
            state.state = "cached"
            self._manifests[state.name] = planned.record.manifest()
            self._tracker.stage_cached(planned, self._manifests[state.name])
            self._progress.cached(state.name)
            return
        inputs = {name: self._manifests[name] for name in planned.inputs}
        state.state, state.started = "running", time.monotonic()
        planned.record.open(describe(planned.stage, planned.inputs))
        self._tracker.stage_started(planned, inputs)
        state.units = planned.stage.plan(inputs)
        for unit in state.units:
            if planned.record.receipt(unit) is None:
                state.queue.append(self._task(planned, unit))
            else:
                state.num_reused += 1
        self._progress.started(state.name, len(state.units), state.num_reused)
        self._finish_if_done(state)

    def _task(self, planned: PlannedStage, unit: Unit) -> Task:
        return Task(
            store=self._ledger.store,
            stage=planned.stage,
            fingerprint=planned.fingerprint,
            inputs=planned.inputs,
            unit=unit,
            device="cuda" if self.states[planned.name].resources.gpus else "cpu",
        )

    def _finish_if_done(self, state: StageState) -> None:
        if state.queue or state.num_in_flight or state.state != "running":
            return
        state.seconds = time.monotonic() - state.started
        self._send_progress(state)
        try:
            if state.failures:
                raise StageFailed(_report(state))
            self._manifests[state.name] = self._complete(state)
        except StageFailed as error:
            state.state = "failed"
            state.is_hopeless |= not state.failures  # the stage's own check refused its result
            state.failures.setdefault("", str(error))
            self._tracker.stage_failed(state.name, str(error))
            self._progress.failed(state.name)
        else:
            state.state = "ran"
            self._progress.finished(state.name, state.seconds)

    def _complete(self, state: StageState) -> Manifest:
        planned = state.planned
        receipts = [planned.record.receipt(unit) for unit in state.units]
        check = getattr(planned.stage, "check", None)
        if check is not None:
            check(receipts)
        manifest = planned.record.complete(
            state.name,
            describe(planned.stage, planned.inputs),
            planned.inputs,
            state.units,
            self._run_id,
        )
        curves = {
            unit.id: read_progress(self._task(planned, unit).progress_path) for unit in state.units
        }
        self._tracker.stage_finished(manifest, {key: rows for key, rows in curves.items() if rows})
        return manifest

    # -- units -----------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        running = [state for state in self.states.values() if state.queue]
        pooled = [state for state in running if state.num_workers == 1]
        for state in pooled:
            while state.queue:
                reference = self._pool.dispatch(state.queue[0], state.resources)
                if reference is None:
                    break
                self._took(state, reference)
        if not any(state.queue for state in pooled):
            self._pool.retire_idle()
        for state in running:
            while state.num_workers > 1 and state.queue:
                self._took(state, run_gang.remote(state.queue[0], state.resources))

    def _took(self, state: StageState, reference: ray.ObjectRef) -> None:
        self._in_flight[reference] = (state, state.queue.popleft())
        state.num_in_flight += 1

    def _collect(self) -> None:
        if not self._in_flight:
            return
        ready, _ = ray.wait(list(self._in_flight), num_returns=1, timeout=POLL_S)
        for reference in ready:
            state, task = self._in_flight.pop(reference)
            state.num_in_flight -= 1
            error = self._result(reference, state)
            if error is not None:
                self._retry_or_fail(state, task, error)
            self._finish_if_done(state)

    def _result(self, reference: ray.ObjectRef, state: StageState) -> Exception | None:
        error: Exception | None = None
        try:
            ray.get(reference)
        except ray.exceptions.RayError as caught:  # any failure of a unit; SIGTERM is none
            error = caught
        if state.num_workers == 1:
            self._pool.release(reference, dead=isinstance(error, ray.exceptions.RayActorError))
        return error

    def _retry_or_fail(self, state: StageState, task: Task, error: Exception) -> None:
        message = root_message(error)
        if task.attempt < state.resources.attempts and not _is_hopeless(error):
            self._progress.say(
                f"{state.name}/{task.unit.id}: attempt {task.attempt} of "
                f"{state.resources.attempts} failed: {message}"
            )
            state.queue.append(replace(task, attempt=task.attempt + 1))
        else:
            state.failures[task.unit.id] = message
            state.is_hopeless |= not _is_passing(error)
            self._progress.say(f"{state.name}/{task.unit.id} failed: {message}")

    # -- progress --------------------------------------------------------------------------------

    def _show_progress(self, *, force: bool = False) -> None:
        if not force and time.monotonic() < self._next_progress:
            return
        self._next_progress = time.monotonic() + PROGRESS_S
        for state in self.states.values():
            if state.state == "running":
                self._send_progress(state)

    def _send_progress(self, state: StageState) -> None:
        """Pass on what units have reported since last time."""
        latest: dict[str, Mapping[str, float]] = {}
        for unit in state.units:
            path = self._task(state.planned, unit).progress_path
            rows = read_progress(path)
            if not rows:
                continue
            latest[unit.id] = rows[-1]
            num_sent = min(state.num_rows_sent.get(unit.id, 0), len(rows))
            if rows[num_sent:]:
                name = unit.id if len(state.units) > 1 else ""
                self._tracker.progress(state.name, name, rows[num_sent:])
            state.num_rows_sent[unit.id] = len(rows)
        self._progress.update(state.name, state.num_done, latest)

    def _raise_failures(self) -> None:
        failed = [state for state in self.states.values() if state.state == "failed"]
        if failed:
            text = "\n".join(state.failures[""] for state in failed)
            passing = not any(state.is_hopeless for state in failed)
            raise RetryableError(text) if passing else StageFailed(text)


def _report(state: StageState) -> str:
    """The first failure first, then the others, a line each."""
    lines = [f"  {unit}: {message}" for unit, message in state.failures.items()]
    return (
        f"stage {state.name}: {len(state.failures)} of {len(state.units)} units failed\n"
        + "\n".join(lines)
    )


def root_cause(error: BaseException) -> BaseException:
    """The exception that a unit raised, freed of Ray's wrapping of tasks and gangs."""
    while True:
        failures = getattr(error, "worker_failures", None) or {}
        inner = getattr(error, "cause", None) or next(iter(failures.values()), None)
        if not isinstance(inner, BaseException) or inner is error:
            return error
        error = inner


def root_message(error: BaseException) -> str:
    """What the unit's own exception said."""
    cause = root_cause(error)
    text = str(cause).strip()
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__


def _is_hopeless(error: BaseException) -> bool:
    """Whether trying again cannot help: the input itself is wrong."""
    return isinstance(root_cause(error), ValueError | UserError)


def _is_passing(error: BaseException) -> bool:
    """Whether the surroundings failed: an outage, or a worker that died."""
    return isinstance(root_cause(error), RetryableError | ray.exceptions.RayActorError)
