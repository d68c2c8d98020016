"""Units in flight: given to workers, watched while they are at work, collected when they are over.

A unit that no worker has begun in time, or that takes longer than it may, is ended here. Seconds of
workers are counted from the moment a unit is begun: one that waits for room costs nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import ray

from pipelines.driver.failures import NotBegun, TookTooLong, is_lost, stopped
from pipelines.driver.gang import Gang
from pipelines.driver.pool import Shape, WorkerPool, shape_of
from pipelines.driver.ray_cluster import free_and_asked
from pipelines.driver.stage_state import StageState
from pipelines.stage import Receipt
from pipelines.store.location import Location
from pipelines.worker.execute import Task

LOOK_S = 1.0  # between two looks into the store for a gang that has begun


@dataclass(kw_only=True)
class Flight:
    """One attempt at a unit.

    Attributes:
        begins: done when the unit's worker is there; None where the gang says it in the store.
        dispatched: since when it waits for its workers, while nothing else is at work.
        begun: when the workers set out, by our own clock; 0: not yet.
    """

    state: StageState
    task: Task
    reference: ray.ObjectRef
    begins: ray.ObjectRef | None = None
    gang: Gang | None = None
    dispatched: float = field(default_factory=time.monotonic)
    begun: float = 0.0
    next_look: float = 0.0

    def look(self) -> None:
        """Note whether the workers are there."""
        now = time.monotonic()
        if self.begun or now < self.next_look:
            return
        if self.gang is not None:
            self.next_look = now + LOOK_S
            self.begun = now if self.gang.has_begun else 0.0
        elif self.begins is not None and _is_there(self.begins):
            self.begun = now

    def count(self) -> None:
        """Add what the attempt took to its stage; once, at its end."""
        if self.begun:
            self.state.worker_seconds += (time.monotonic() - self.begun) * self.state.num_workers

    @property
    def overdue(self) -> Exception | None:
        """Why the attempt must be ended, if it must."""
        now, resources = time.monotonic(), self.state.resources
        if not self.begun:
            deadline_s = resources.start_deadline_s
            if deadline_s != "none" and now - self.dispatched > deadline_s:
                return _not_begun(self.state, deadline_s)
        elif resources.timeout_s != "none" and now - self.begun > resources.timeout_s:
            return TookTooLong(
                f"not done after {resources.timeout_s:g} s (resources."
                f"{self.state.resources_name}.timeout_s), and ended"
            )
        return None


class Landing(NamedTuple):
    """An attempt that is over: its receipt, or what went wrong; it may not even have begun."""

    state: StageState
    task: Task
    receipt: Receipt | None
    error: Exception | None
    has_begun: bool = True


class Flights:
    """All units in flight.

    Args:
        scratch: the run's own folder of what is in flight.
    """

    def __init__(self, scratch: Location) -> None:
        self._scratch = scratch
        self._pool = WorkerPool()
        self._by_reference: dict[ray.ObjectRef, Flight] = {}
        self._refused: list[Landing] = []
        self._no_room_since: dict[str, float] = {}  # stage -> while nothing at all is in flight

    def __len__(self) -> int:
        return len(self._by_reference)

    def __iter__(self) -> Iterator[tuple[StageState, Task]]:
        return iter([(flight.state, flight.task) for flight in self._by_reference.values()])

    def dispatch(self, states: Iterable[StageState]) -> list[Task]:
        """Give workers as many units as there is room for; returns the units that set out."""
        running = [state for state in states if state.state == "running" and state.has_next()]
        pooled = [state for state in running if state.num_workers == 1]
        sent = [task for state in pooled for task in self._to_pool(state)]
        self._hire(pooled)
        if not any(state.queue for state in pooled):
            self._pool.retire()
        for state in running:
            while state.num_workers > 1 and state.has_next():
                task = state.queue.popleft()
                gang = Gang(self._scratch, task)
                reference = gang.start(state.resources)
                self._add(Flight(state=state, task=task, reference=reference, gang=gang))
                sent.append(task)
        return sent

    def _to_pool(self, state: StageState) -> Iterator[Task]:
        while state.has_next():
            started = self._pool.dispatch(state.queue[0], state.resources)
            if started is None:
                if not self._by_reference:  # else what is in flight will make room
                    self._no_room_since.setdefault(state.name, time.monotonic())
                return
            self._no_room_since.pop(state.name, None)
            task = state.queue.popleft()
            reference, begins = started
            self._add(Flight(state=state, task=task, reference=reference, begins=begins))
            yield task

    def _hire(self, states: Iterable[StageState]) -> None:
        """Ask for a worker for each unit that waits, as far as there is room."""
        num_covered: Counter[Shape] = Counter()
        for state in states:
            if not state.queue:
                continue
            shape = shape_of(state.queue[0], state.resources)
            number = 1
            while state.has_next(number):
                is_covered = num_covered[shape] + number <= self._pool.num_arriving(shape)
                if not is_covered and not self._pool.hire(shape, state.resources):
                    break
                number += 1
            num_covered[shape] += number - 1
            if (error := self._pool.refusal(shape)) is not None:
                self._refused.append(Landing(state, state.queue.popleft(), None, error))
        if num_covered:  # else nobody waits
            self._pool.make_way(num_covered)

    def _add(self, flight: Flight) -> None:
        self._by_reference[flight.reference] = flight
        flight.state.num_in_flight += 1

    def collect(self, wait_s: float) -> list[Landing]:
        """Attempts that are over, or that had to be ended; waits at most so long for the first."""
        landed, self._refused = self._refused, []
        waited_for = [*self._by_reference, *self._pool.arriving]
        if not waited_for:
            time.sleep(wait_s)
        else:
            ready, _ = ray.wait(waited_for, num_returns=1, timeout=wait_s)
            landed += [self._land(one) for one in ready if one in self._by_reference]
        for flight in self._by_reference.values():
            flight.look()
        self._wait_for_room()
        for flight in list(self._by_reference.values()):
            if (error := flight.overdue) is not None:
                self._end(flight)
                landed.append(Landing(flight.state, flight.task, None, error))
        return landed

    def _wait_for_room(self) -> None:
        """Attempts that have not begun wait for those that have: their end makes room."""
        if any(flight.begun for flight in self._by_reference.values()):
            for flight in self._by_reference.values():
                flight.dispatched = time.monotonic()

    def _land(self, reference: ray.ObjectRef) -> Landing:
        flight = self._by_reference[reference]
        receipt, error = None, None
        try:
            receipt = ray.get(reference)
        except ray.exceptions.RayError as found:  # any failure of a unit; SIGTERM is none
            error = found
        flight.look()
        # A worker that was told to end has kept its state; its process is about to go.
        lost = error is not None and (is_lost(error) or stopped(error) is not None)
        self._take_out(flight, lost=lost)
        has_begun = bool(flight.begun) or flight.gang is not None
        return Landing(flight.state, flight.task, receipt, error, has_begun)

    def stranded(self, states: Iterable[StageState]) -> list[Landing]:
        """Units that could not even be given out for too long: there is no room any more."""
        found = []
        for state in states:
            since, deadline_s = (
                self._no_room_since.get(state.name),
                state.resources.start_deadline_s,
            )
            if since is None or self._by_reference or not state.queue:
                self._no_room_since.pop(state.name, None)
            elif deadline_s != "none" and time.monotonic() - since > deadline_s:
                del self._no_room_since[state.name]
                task = state.queue.popleft()
                found.append(Landing(state, task, None, _not_begun(state, deadline_s)))
        return found

    def end_all(self, state: StageState) -> list[Task]:
        """End what a stage has in flight; returns those units."""
        mine = [one for one in self._by_reference.values() if one.state is state]
        for flight in mine:
            self._end(flight)
        return [flight.task for flight in mine]

    def _end(self, flight: Flight) -> None:
        """End the processes of an attempt."""
        if flight.gang is not None:
            flight.gang.end(flight.reference)
        self._take_out(flight, lost=True)

    def _take_out(self, flight: Flight, *, lost: bool) -> None:
        del self._by_reference[flight.reference]
        flight.state.num_in_flight -= 1
        flight.count()
        if flight.gang is None:
            self._pool.release(flight.reference, lost=lost)

    def retire(self) -> None:
        """End the workers that do nothing."""
        self._pool.retire()

    def count_rest(self) -> None:
        """Count what is still in flight, for a run that leaves it."""
        for flight in self._by_reference.values():
            flight.count()


def _is_there(begins: ray.ObjectRef) -> bool:
    """Whether a worker has answered; one that died before it could has not."""
    if not ray.wait([begins], timeout=0)[0]:
        return False
    try:
        ray.get(begins)
    except ray.exceptions.RayError:
        return False
    return True


def _not_begun(state: StageState, deadline_s: float) -> NotBegun:
    return NotBegun(
        f"no worker had begun after {deadline_s:g} s (resources.{state.resources_name}."
        f"start_deadline_s): {free_and_asked(state.resources, state.num_workers)}; free some of "
        "it, ask for less, or wait longer"
    )
