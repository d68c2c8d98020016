"""What becomes of a unit whose attempt failed: it is tried again, or failed for good."""

from __future__ import annotations

from dataclasses import replace

from pipelines.driver.backoff import delay_s
from pipelines.driver.failures import (
    NotBegun,
    fenced,
    is_hopeless,
    is_lost,
    is_passing,
    root_message,
    stopped,
)
from pipelines.driver.flights import Flights, Landing
from pipelines.driver.progress import Progress
from pipelines.driver.stage_state import StageState
from pipelines.store import lease
from pipelines.store.lease import Fenced
from pipelines.worker.execute import Task

STOP_PAUSE_S = 5.0  # before a unit goes on that was told to end twice
MAX_STRAYS = 5  # how often a unit may be given to workers that are dead already


class Retries:
    """Judges failed attempts, and queues their units again where that may help."""

    def __init__(self, flights: Flights, progress: Progress) -> None:
        self._flights, self._progress = flights, progress

    def after(self, landing: Landing, error: Exception) -> Fenced | None:
        """Queue the unit again or note its failure.

        Returns:
            The store's word that the stage is another run's now; nothing was queued then.
        """
        state, task = landing.state, landing.task
        name = f"{state.name}/{task.unit.id}"
        if (lost := fenced(error)) is not None:
            return lost
        if (word := stopped(error)) is not None:
            self._progress.say(f"{name}: {word}")
            self._go_on_later(state, task)
        elif not landing.has_begun and is_lost(error) and self._gave_out_again(state, task):
            self._progress.say(
                f"{name}: {root_message(error)}, before the unit reached it; given out again"
            )
        elif _num_tried(state, task) < state.resources.attempts and not is_hopeless(error):
            self._try_again(state, task, error)
        else:
            state.failures[task.unit.id] = root_message(error)
            state.is_hopeless |= not is_passing(error)
            self._progress.say(f"{name} failed: {root_message(error)}")
            self._end_siblings(state, task, error)
        return None

    def _try_again(self, state: StageState, task: Task, error: Exception) -> None:
        num_tried = _num_tried(state, task)
        pause_s = delay_s(state.resources.backoff_s, num_tried, task.unit.id)
        self._progress.say(
            f"{state.name}/{task.unit.id}: attempt {num_tried} of {state.resources.attempts} "
            f"failed: {root_message(error)}; tried again in {pause_s:.1f} s"
        )
        again = replace(task, attempt=task.attempt + 1)
        if is_lost(error) or state.num_workers > 1:
            _fence(state, again)
        state.give_out_later(again, pause_s)

    def _gave_out_again(self, state: StageState, task: Task) -> bool:
        """Queue a unit again whose worker was gone before it; a few times that costs no attempt."""
        unit = task.unit.id
        num_strays = state.num_strays.get(unit, 0) + 1
        if num_strays > MAX_STRAYS:
            return False
        state.num_strays[unit] = num_strays
        pause_s = delay_s(state.resources.backoff_s, num_strays - 1, unit) if num_strays > 1 else 0
        again = replace(task, attempt=task.attempt + 1)
        _fence(state, again)
        state.give_out_later(again, pause_s)
        return True

    def _go_on_later(self, state: StageState, task: Task) -> None:
        """A unit ended with its state saved: no failure. It goes on, here or in the next run."""
        unit = task.unit.id
        num_stops = state.num_stops[unit] = state.num_stops.get(unit, 0) + 1
        pause_s = delay_s(STOP_PAUSE_S, num_stops - 1, unit) if num_stops > 1 else 0.0
        state.give_out_later(task, pause_s)  # the node that is taken away may be the same again

    def _end_siblings(self, state: StageState, task: Task, error: Exception) -> None:
        """Leave the stage's other units, if the recipe says so or nobody has room for them."""
        if state.resources.on_failure == "stop" and not state.may_do_without:
            if ended := self._flights.end_all(state):
                names = ", ".join(one.unit.id for one in ended)
                self._progress.say(f"{state.name}: ended {names}, because {task.unit.id} failed")
        elif not isinstance(error, NotBegun):
            return
        state.is_cut_short = True
        state.drop_waiting()


def _num_tried(state: StageState, task: Task) -> int:
    """Attempts that reached a worker."""
    return task.attempt - state.num_strays.get(task.unit.id, 0)


def _fence(state: StageState, task: Task) -> None:
    """Refuse attempts before this one: a worker that was lost may live on, out of reach."""
    directory = state.planned.record.directory
    lease.fence(directory, task.unit.id, task.attempt, token=state.token)
