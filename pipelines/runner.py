"""The driver: a disposable loop that hands units to Ray until every stage has its manifest.

It keeps nothing that matters: what is done stands in the ledger, so killing it at any moment and
running the same command again finishes the work without redoing finished units.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import ray

from pipelines.errors import RetryableError, StageFailed
from pipelines.execute import Task
from pipelines.failures import is_hopeless, is_passing, root_message, stopped
from pipelines.fingerprint import unit_key
from pipelines.gang import run_gang
from pipelines.ledger import Ledger
from pipelines.planning import PlannedStage, contents_of, describe
from pipelines.pool import WorkerPool
from pipelines.progress import Progress
from pipelines.ray_cluster import check_room
from pipelines.recipe import CacheRecipe
from pipelines.stage import Manifest, Receipt, Unit
from pipelines.stage_state import StageState, kept, report
from pipelines.stopping import Interruption, StopMark
from pipelines.tracking import Tracker
from pipelines.unit_reports import UnitReports

POLL_S = 0.25
NUM_REASONS_SHOWN = 5  # units of a stage whose reason is told


class Runner:
    """Runs the stages that the plan says are missing.

    Args:
        retry: by stage, units to do again although they have a receipt.
        interruption: says when somebody wants the run to end.
    """

    def __init__(
        self,
        recipe: CacheRecipe,
        ledger: Ledger,
        planned: Sequence[PlannedStage],
        *,
        run_id: str,
        tracker: Tracker,
        progress: Progress,
        retry: Mapping[str, frozenset[str]] | None = None,
        interruption: Interruption | None = None,
    ) -> None:
        self._ledger, self._run_id, self._retry = ledger, run_id, retry or {}
        self._tracker, self._progress = tracker, progress
        self._reports = UnitReports(tracker, progress)
        self._interruption = interruption or Interruption()
        self.states = {
            one.name: StageState(planned=one, resources=recipe.resources_of(one.name))
            for one in planned
        }
        self._manifests: dict[str, Manifest] = {}
        self._in_flight: dict[ray.ObjectRef, tuple[StageState, Task]] = {}
        self._pool = WorkerPool()

    def run(self) -> None:
        """Run until every stage is over.

        Raises:
            StageFailed: a stage failed; names it, its units and what each said.
            RetryableError: the same, when nothing but the surroundings failed; or SIGTERM, after
                training has saved.
            UserError: a stage asks for more than the cluster has.
            KeyboardInterrupt: Ctrl-C, after training has saved.
        """
        for state in self.states.values():
            if not state.planned.is_hit:
                check_room(state.name, state.resources, state.num_workers)
        while not all(state.is_over for state in self.states.values()):
            if self._interruption.error is not None:
                self._let_training_save()
                raise self._interruption.error
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
        inputs = {name: self._manifests[name] for name in planned.inputs}
        contents = contents_of(planned.inputs, inputs)
        if planned.record.is_complete and state.name not in self._retry:
            manifest = planned.record.manifest()
            if manifest.input_contents == contents:
                self._take_cached(state, manifest)
                return
        state.state, state.started = "running", time.monotonic()
        self._tracker.stage_started(planned, inputs)
        trusted = planned.record.open(describe(planned.stage, planned.inputs), contents)
        done = planned.record.done_units()
        state.num_units = sum(1 for _ in self._units(planned))
        state.pending = self._pending(state, done, trusted)
        has_work = state.has_next()  # finds the units that need nothing on the way
        self._progress.started(state.name, state.num_units, state.num_kept)
        if not has_work:
            self._finish_if_done(state)

    def _take_cached(self, state: StageState, manifest: Manifest) -> None:
        state.state = "cached"
        self._manifests[state.name] = manifest
        self._tracker.stage_cached(state.planned, manifest)
        self._progress.cached(state.name)

    def _units(self, planned: PlannedStage) -> Iterator[Unit]:
        """The stage's units; those without a key of their own belong to these input contents."""
        inputs = {name: self._manifests[name] for name in planned.inputs}
        key = unit_key(planned.fingerprint, inputs=contents_of(planned.inputs, inputs))
        for unit in planned.stage.plan(inputs):
            yield unit if unit.key else replace(unit, key=key)

    def _pending(self, state: StageState, done: set[str], trusted: bool) -> Iterator[Task]:
        """Tasks for the units that have no receipt, or one that no longer holds."""
        record = state.planned.record
        retry = self._retry.get(state.name, frozenset())
        for unit in self._units(state.planned):
            if unit.id in retry:
                yield replace(self._task(state.planned, unit), is_retry=True)
                continue
            if unit.id in done:
                receipt = None if trusted else record.receipt(unit.id)
                if trusted or (receipt is not None and receipt.key == unit.key):
                    state.num_kept += 1
                    state.num_done += 1
                    continue
            yield self._task(state.planned, unit)

    def _task(self, planned: PlannedStage, unit: Unit) -> Task:
        return Task(
            store=str(self._ledger.store),
            stage=planned.stage,
            fingerprint=planned.fingerprint,
            inputs=planned.inputs,
            unit=unit,
            run_id=self._run_id,
            device="cuda" if self.states[planned.name].resources.gpus else "cpu",
            earlier=planned.earlier,
        )

    def _finish_if_done(self, state: StageState) -> None:
        if state.num_in_flight or state.state != "running" or state.has_next():
            return
        try:
            if state.failures:
                raise StageFailed(report(state))
            if self._amend(state):
                return
            manifest = self._complete(state)
        except StageFailed as error:
            state.state = "failed"
            state.is_hopeless |= not state.failures  # the stage's own check refused its result
            state.failures.setdefault("", str(error))
            self._tracker.stage_failed(state.name, str(error))
            self._progress.failed(state.name)
        else:
            state.state = "ran"
            state.seconds = time.monotonic() - state.started
            self._manifests[state.name] = manifest
            self._progress.finished(state.name, state.seconds, kept(state))

    def _amend(self, state: StageState) -> bool:
        """Queue the units that the stage wants done again now that it can see all of them."""
        amend = getattr(state.planned.stage, "amend", None)
        if amend is None:
            return False
        record = state.planned.record
        units = amend(self._receipts(state.planned), record.directory)
        for unit in units:
            record.forget(unit.id)
            state.queue.append(self._task(state.planned, unit))
            state.num_done -= 1
        return bool(units)

    def _receipts(self, planned: PlannedStage) -> Iterator[Receipt]:
        for unit in planned.stage.plan({name: self._manifests[name] for name in planned.inputs}):
            receipt = planned.record.receipt(unit.id)
            assert receipt is not None, f"{planned.name}: unit {unit.id} has no receipt"
            yield receipt

    def _complete(self, state: StageState) -> Manifest:
        planned = state.planned
        check = getattr(planned.stage, "check", None)
        if check is not None:
            check(self._receipts(planned))
        inputs = {name: self._manifests[name] for name in planned.inputs}
        manifest = planned.record.complete(
            state.name,
            describe(planned.stage, planned.inputs),
            planned.inputs,
            contents_of(planned.inputs, inputs),
            (unit.id for unit in planned.stage.plan(inputs)),
            self._run_id,
        )
        self._tracker.stage_finished(manifest, state.curves)
        return manifest

    # -- units -----------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        running = [s for s in self.states.values() if s.state == "running" and s.has_next()]
        pooled = [state for state in running if state.num_workers == 1]
        for state in pooled:
            while state.has_next():
                reference = self._pool.dispatch(state.queue[0], state.resources)
                if reference is None:
                    break
                self._took(state, reference)
        if not any(state.queue for state in pooled):
            self._pool.retire_idle()
        for state in running:
            while state.num_workers > 1 and state.has_next():
                self._took(state, run_gang.remote(state.queue[0], state.resources))

    def _took(self, state: StageState, reference: ray.ObjectRef) -> None:
        task = state.queue.popleft()
        self._in_flight[reference] = (state, task)
        state.num_in_flight += 1
        self._reports.begin(state, task)

    def _collect(self) -> None:
        if not self._in_flight:
            return
        ready, _ = ray.wait(list(self._in_flight), num_returns=1, timeout=POLL_S)
        for reference in ready:
            state, task = self._in_flight.pop(reference)
            state.num_in_flight -= 1
            try:
                receipt = self._result(reference, state)
            except ray.exceptions.RayError as error:  # any failure of a unit; SIGTERM is none
                self._retry_or_fail(state, task, error)
            else:
                self._note(state, task, receipt)
            self._finish_if_done(state)

    def _result(self, reference: ray.ObjectRef, state: StageState) -> Receipt:
        is_lost = False
        try:
            return ray.get(reference)
        except ray.exceptions.RayError as error:
            # A worker that was told to end has kept its state; its process is about to go.
            is_lost = isinstance(error, ray.exceptions.RayActorError) or bool(stopped(error))
            raise
        finally:
            if state.num_workers == 1:
                self._pool.release(reference, lost=is_lost)

    def _note(self, state: StageState, task: Task, receipt: Receipt) -> None:
        """Count a finished unit; keep its last rows and why it was done."""
        state.num_done += 1
        if receipt.taken_from:
            state.num_taken_over += 1
        elif receipt.reason:
            state.reasons[task.unit.id] = receipt.reason
            if len(state.reasons) <= NUM_REASONS_SHOWN:
                self._progress.say(f"{state.name}/{task.unit.id}: done again: {receipt.reason}")
        self._reports.send(state, task)

    def _retry_or_fail(self, state: StageState, task: Task, error: Exception) -> None:
        message = root_message(error)
        if (word := stopped(error)) is not None:
            self._progress.say(f"{state.name}/{task.unit.id}: {word}")
            state.queue.append(task)  # no failure: it goes on, here or in the next run
        elif task.attempt < state.resources.attempts and not is_hopeless(error):
            self._progress.say(
                f"{state.name}/{task.unit.id}: attempt {task.attempt} of "
                f"{state.resources.attempts} failed: {message}"
            )
            state.queue.append(replace(task, attempt=task.attempt + 1))
        else:
            state.failures[task.unit.id] = message
            state.is_hopeless |= not is_passing(error)
            self._progress.say(f"{state.name}/{task.unit.id} failed: {message}")

    def _let_training_save(self) -> None:
        """Ask the units that can keep their state to do so, and give them their time.

        The others are not waited for: what they have begun is short and done again.
        """
        units = self._saving()
        if not units:
            return
        names = ", ".join(f"{name} ({deadline_s:g} s)" for name, deadline_s in units.items())
        self._progress.say(f"told to end: waits for {names} to save; once more to leave at once")
        mark = StopMark(self._ledger.store, self._run_id)
        started = time.monotonic()
        try:
            mark.put()
            while any(time.monotonic() - started < units[name] for name in self._saving()):
                self._collect()
                self._show_progress()
        finally:
            mark.remove()
        for name in self._saving():
            self._progress.say(f"{name} has not saved in time; its last checkpoint counts")

    def _saving(self) -> dict[str, float]:
        """Units in flight that can save, with the seconds they may take."""
        return {
            f"{state.name}/{task.unit.id}": state.resources.stop_deadline_s
            for state, task in self._in_flight.values()
            if state.can_stop
        }

    def _show_progress(self, *, force: bool = False) -> None:
        self._reports.show(self.states.values(), self._in_flight.values(), force=force)

    def _raise_failures(self) -> None:
        failed = [state for state in self.states.values() if state.state == "failed"]
        if failed:
            text = "\n".join(state.failures[""] for state in failed)
            passing = not any(state.is_hopeless for state in failed)
            raise RetryableError(text) if passing else StageFailed(text)
