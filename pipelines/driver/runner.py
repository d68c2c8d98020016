"""The driver: a disposable loop that hands units to Ray until every stage has its manifest.

It keeps nothing that matters: what is done stands in the ledger, so killing it at any moment and
running the same command again finishes the work without redoing finished units. A stage is worked
on by the driver that holds its lease; the others wait for its manifest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from pipelines.driver.flights import Flights
from pipelines.driver.head_watch import HeadWatch
from pipelines.driver.progress import Progress
from pipelines.driver.ray_cluster import check_room, is_joined
from pipelines.driver.retries import Retries
from pipelines.driver.saving import let_training_save
from pipelines.driver.stage_state import StageState, kept, report, stood_in
from pipelines.driver.stage_work import StageWork
from pipelines.driver.unit_reports import UnitReports
from pipelines.errors import RetryableError, StageFailed, UserError
from pipelines.jobs.stage_jobs import StageJobs
from pipelines.planning import PlannedStage
from pipelines.recipe import CacheRecipe
from pipelines.stage import Manifest, Receipt
from pipelines.store import lease
from pipelines.store.lease import Fenced, Held
from pipelines.store.ledger import Ledger
from pipelines.store.processes import Owner
from pipelines.store.stopping import Interruption, StopMark
from pipelines.tracking.tracker import Tracker
from pipelines.worker.execute import Task

POLL_S = 0.25
LOOK_ELSEWHERE_S = 2.0  # between two looks at a stage that somebody else works on
NUM_REASONS_SHOWN = 5  # units of a stage whose reason is told


class Runner:
    """Runs the stages that the plan says are missing.

    Args:
        retry: by stage, units to do again although they have a receipt.
        interruption: says when somebody wants the run to end.
        owner: who holds the leases; by default this process.
        busy: what to do about a stage that another driver works on.
        stage_jobs: drives the stages that the recipe leaves to jobs of their own.
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
        owner: Owner | None = None,
        busy: Literal["wait", "leave"] = "wait",
        stage_jobs: StageJobs | None = None,
    ) -> None:
        self._ledger, self._run_id, self._busy = ledger, run_id, busy
        self._owner = owner or Owner.of_this_process(run_id)
        self._tracker, self._progress = tracker, progress
        self._reports = UnitReports(tracker, progress)
        self._interruption = interruption or Interruption()
        self.states = {
            one.name: StageState(planned=one, resources=recipe.resources_of(one.name))
            for one in planned
        }
        self._work = StageWork(ledger=ledger, run_id=run_id, retry=retry or {})
        self._flights = Flights(ledger.scratch_of(run_id))
        self._retries = Retries(self._flights, progress)
        self._jobs = stage_jobs or StageJobs(recipe, ledger, run_id=run_id, say=progress.say)
        self._next_look_elsewhere = 0.0

    def run(self) -> None:
        """Run until every stage is over.

        Raises:
            StageFailed: a stage failed; names it, its units and what each said.
            RetryableError: the same, when nothing but the surroundings failed; or SIGTERM, after
                training has saved; or the cluster's head is gone; or another driver works on a
                stage, and we shall not wait.
            UserError: a stage asks for more than the cluster has that was started for this run, or
                cannot be planned.
            KeyboardInterrupt: Ctrl-C, after training has saved.
        """
        head = HeadWatch.of_this_cluster()
        for state in self.states.values():
            if not state.planned.is_hit:
                self._check_room(state)
        try:
            while not all(state.is_over for state in self.states.values()):
                if (wish := self._interruption.look()) is not None:
                    self._let_training_save()
                    raise wish
                if not head.answers() or not self._step():
                    time.sleep(POLL_S)
            self._show_progress(force=True)
            self._jobs.await_end()
        finally:
            self._flights.count_rest()
            if head.is_there:  # else Ray would wait for it
                self._flights.retire()
            for state in self.states.values():
                state.release()
        self._raise_failures()

    def _check_room(self, state: StageState) -> None:
        """Refuse what can never begin; in a cluster of others' nodes may come, or come back."""
        try:
            check_room(state.name, state.resources, state.num_workers)
        except UserError as error:
            if not is_joined():
                raise
            deadline_s = state.resources.start_deadline_s
            limit = "without end" if deadline_s == "none" else f"at most {deadline_s:g} s"
            self._progress.say(f"{error}; waits for nodes, {limit}")

    def _step(self) -> bool:
        """Once around; returns whether anything happened, or a unit in flight was waited for."""
        before = [state.state for state in self.states.values()]
        self._start_ready_stages()
        self._look_elsewhere()
        sent = self._flights.dispatch(self.states.values())
        for task in sent:
            self._reports.begin(self.states[task.stage.name], task)
        had_flights = bool(self._flights)
        self._collect()
        self._show_progress()
        now = [state.state for state in self.states.values()]
        return bool(sent) or had_flights or now != before

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
        """Take what is there, or the lease; else somebody else has it, and is waited for."""
        if (manifest := self._work.found(state.planned)) is not None:
            self._take_cached(state, manifest)
            return
        if self._is_left_to_job(state, self._jobs.is_at_work):
            return
        held = lease.acquire(state.planned.record.directory, self._owner)
        if isinstance(held, Held):
            self._wait_for(state, held)
            return
        state.lease = held
        if (manifest := self._work.found(state.planned)) is not None:  # finished just now
            self._take_cached(state, manifest)
            return
        if self._is_left_to_job(state, self._jobs.submit):  # which takes the lease itself
            state.release()
            return
        self._begin(state)

    def _begin(self, state: StageState) -> None:
        """Work on a stage whose lease is ours."""
        state.state, state.started = "running", time.monotonic()
        self._tracker.stage_started(state.planned, self._work.inputs(state.planned))
        try:
            self._work.open(state)
            state.has_next()  # finds the units that need nothing on the way
        except UserError as error:  # a user's own stage, or a file of the store
            self._fail(state, UserError(f"stage {state.name}: {error}"))
            return
        self._progress.started(state.name, state.num_units, state.num_kept)
        self._finish_if_done(state)

    def _take_cached(self, state: StageState, manifest: Manifest) -> None:
        state.state, state.num_units = "cached", manifest.num_units
        state.release()
        self._jobs.note_done(state)
        self._work.manifests[state.name] = manifest
        self._tracker.stage_cached(state.planned, manifest)
        self._progress.cached(state.name)

    def _finish_if_done(self, state: StageState) -> None:
        if state.state != "running" or state.has_work():
            return
        try:
            if state.failures and not self._work.put_stand_ins(state):
                raise StageFailed(report(state))
            if self._work.amend(state):
                return
            manifest = self._work.complete(state)
        except Fenced as error:
            self._give_up(state, str(error))
        except (StageFailed, UserError) as error:
            self._fail(state, error)
        else:
            state.state = "ran"
            state.seconds = time.monotonic() - state.started
            state.release()
            self._work.manifests[state.name] = manifest
            self._tracker.stage_finished(manifest, state.curves)
            self._progress.finished(state.name, state.seconds, kept(state))
            if state.failures:
                self._progress.say(stood_in(state))

    def _fail(self, state: StageState, error: StageFailed | UserError) -> None:
        state.state, state.is_users_error = "failed", isinstance(error, UserError)
        message = str(error)
        state.is_hopeless |= not state.failures  # the stage's own check refused its result
        state.failures.setdefault("", message)
        state.drop_waiting()
        state.release()
        self._tracker.stage_failed(state.name, message)
        self._progress.failed(state.name)

    # -- stages that somebody else works on ------------------------------------------------------

    def _is_left_to_job(self, state: StageState, act: Callable[[StageState], bool]) -> bool:
        """Whether a job of the stage's own is at work, or has failed, after `act` on it."""
        if state.name in self._work.retry or not self._jobs.is_wanted(state):
            return False
        try:
            if not act(state):
                return False
            state.state = "elsewhere"
            if self._busy == "leave" and (who := self._jobs.other_run(state)):
                self._leave(state, who)
        except (StageFailed, UserError) as error:
            self._fail(state, error)
        except RetryableError as error:
            self._fail_for_now(state, str(error))
        return True

    def _leave(self, state: StageState, who: str) -> None:
        why = "works on it; run again once that has ended, or let this command wait for it"
        self._fail_for_now(state, f"stage {state.name}: {who} {why}")

    def _fail_for_now(self, state: StageState, message: str) -> None:
        """End a stage for this run because of something that may pass."""
        state.state = "failed"
        state.failures[""] = message
        self._progress.failed(state.name)

    def _wait_for(self, state: StageState, held: Held) -> None:
        if self._busy == "leave":
            self._leave(state, str(held))
            return
        if state.state != "elsewhere" or state.holder != held.owner:
            self._progress.say(f"{state.name}: {held} works on it; waits for it")
        state.state, state.holder = "elsewhere", held.owner

    def _look_elsewhere(self) -> None:
        """See whether what others work on is finished, or free; and whether ours still is ours."""
        for state in self.states.values():
            if state.state == "running" and state.lease is not None and state.lease.lost:
                self._give_up(state, "another run has taken the stage over")
        if time.monotonic() < self._next_look_elsewhere:
            return
        self._next_look_elsewhere = time.monotonic() + LOOK_ELSEWHERE_S
        for state in self.states.values():
            if state.state == "elsewhere":
                self._start(state)
                if state.state == "running":
                    self._progress.say(f"{state.name}: is free again; goes on here")

    def _give_up(self, state: StageState, why: str) -> None:
        """Stop working on a stage that is not ours any more, and wait for who has it."""
        self._flights.end_all(state)
        state.drop_waiting()
        state.release()
        state.begin_anew()
        state.state = "elsewhere"
        self._tracker.stage_failed(state.name, why)
        self._progress.say(f"{state.name}: stopped here: {why}")

    # -- units -----------------------------------------------------------------------------------

    def _collect(self) -> None:
        landed = self._flights.collect(POLL_S) + self._flights.stranded(self.states.values())
        for landing in landed:
            state = landing.state
            if state.state != "running":
                continue  # given up meanwhile
            if landing.error is None:
                assert landing.receipt is not None
                self._note(state, landing.task, landing.receipt)
            elif (lost := self._retries.after(landing, landing.error)) is not None:
                self._give_up(state, str(lost))
            self._finish_if_done(state)

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

    def _let_training_save(self) -> None:
        mark = StopMark(self._ledger.store, self._run_id)

        def turn() -> None:
            self._collect()
            self._show_progress()

        self._jobs.stop()
        let_training_save(self._flights, mark, self._progress.say, turn)
        self._jobs.await_end()

    def _show_progress(self, *, force: bool = False) -> None:
        self._reports.show(self.states.values(), self._flights, force=force)

    def _raise_failures(self) -> None:
        failed = [state for state in self.states.values() if state.state == "failed"]
        if failed:
            text = "\n".join(state.failures[""] for state in failed)
            if not any(state.is_hopeless for state in failed):
                raise RetryableError(text)
            raise (
                UserError(text) if all(one.is_users_error for one in failed) else StageFailed(text)
            )
