"""How far a stage of the running plan is, and words for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipelines.driver.stand_ins import STAND_IN, least_units
from pipelines.planning import PlannedStage
from pipelines.recipe_sections.resources import Resources
from pipelines.store.lease import Lease
from pipelines.store.processes import Owner
from pipelines.worker.execute import Task


@dataclass
class StageState:
    """A stage in the loop. `failures` maps a unit that failed for good to what it said."""

    planned: PlannedStage
    resources: Resources
    state: str = "waiting"  # waiting | running | elsewhere | ran | cached | failed | blocked
    lease: Lease | None = None  # ours on the stage, while it is running
    holder: Owner | None = None  # who else works on it, as far as is known
    # Units not looked at yet: a generator, for there may be very many.
    pending: Iterator[Task] = field(default_factory=lambda: iter(()))
    queue: deque[Task] = field(default_factory=deque)  # the next unit, amendments
    delayed: list[tuple[float, Task]] = field(default_factory=list)  # retries, and their moments
    num_units: int = 0
    plan_digest: str = ""  # of the units' ids, as they were listed at the beginning
    num_in_flight: int = 0
    num_done: int = 0
    num_kept: int = 0  # had a receipt at the start
    num_taken_over: int = 0  # had been done under an earlier fingerprint
    reasons: dict[str, str] = field(default_factory=dict)  # unit -> why it was done again
    failures: dict[str, str] = field(default_factory=dict)
    is_cut_short: bool = False  # after a failure the others were ended, or not begun at all
    is_users_error: bool = (
        False  # the stage could not even be planned, or refused what it was given
    )
    is_hopeless: bool = False  # a failure lies in the work itself, not in the surroundings
    num_rows_sent: dict[str, int] = field(default_factory=dict)
    notices_told: dict[str, set[str]] = field(default_factory=dict)
    grids_sent: dict[str, set[str]] = field(default_factory=dict)  # unit -> file names
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    num_stops: dict[str, int] = field(default_factory=dict)  # unit -> ended with its state saved
    num_strays: dict[str, int] = field(default_factory=dict)  # unit -> given to dead workers
    started: float = 0.0
    seconds: float = 0.0
    worker_seconds: float = 0.0  # of all dispatches, failed ones too: seconds times workers

    @property
    def name(self) -> str:
        return self.planned.name

    @property
    def resources_name(self) -> str:
        """Under which name the recipe says what the stage takes."""
        return self.name.split("/")[0]

    @property
    def num_workers(self) -> int:
        """Workers of one unit; more than one are gathered by Ray Train."""
        return self.resources.num_workers if self.planned.stage.gang else 1

    @property
    def can_stop(self) -> bool:
        """Whether a unit saves and ends when asked to: training does, which is what gangs do."""
        return self.planned.stage.gang

    @property
    def may_do_without(self) -> bool:
        """Whether the stage can be finished although units of it have failed for good."""
        stage = self.planned.stage
        least = least_units(stage, self.num_units)
        return hasattr(stage, STAND_IN) and self.num_units - len(self.failures) >= max(least, 1)

    @property
    def is_over(self) -> bool:
        return self.state in {"ran", "cached", "failed", "blocked"}

    @property
    def token(self) -> int:
        """In whose name work on the stage is published; 0 without a lease."""
        return self.lease.token if self.lease is not None else 0

    def release(self) -> None:
        """Let the stage go, so that others need not wait."""
        if self.lease is not None:
            self.lease.release()
            self.lease = None

    def begin_anew(self) -> None:
        """Forget how far the stage was: somebody else goes on with it."""
        self.num_done = self.num_kept = self.num_taken_over = 0
        self.is_cut_short = self.is_hopeless = False
        self.failures.clear()
        self.reasons.clear()

    def has_next(self, number: int = 1) -> bool:
        """Whether so many units can be dispatched now; they then head the queue."""
        now = time.monotonic()
        self.queue.extend(task for moment, task in self.delayed if moment <= now)
        self.delayed = [(moment, task) for moment, task in self.delayed if moment > now]
        while len(self.queue) < number and (task := next(self.pending, None)) is not None:
            self.queue.append(task)
        return len(self.queue) >= number

    def has_work(self) -> bool:
        """Whether a unit is under way, or to be given out now or later."""
        return bool(self.num_in_flight or self.delayed) or self.has_next()

    def give_out_later(self, task: Task, delay_s: float) -> None:
        """Queue a unit that must wait before it is tried again."""
        self.delayed.append((time.monotonic() + delay_s, task))

    def drop_waiting(self) -> None:
        """Give no further unit out."""
        self.pending = iter(())
        self.queue.clear()
        self.delayed.clear()


def kept(state: StageState) -> str:
    """What was not done: `40 units kept, 59 taken over`."""
    words = [(state.num_kept, "kept"), (state.num_taken_over, "taken over")]
    said = ", ".join(f"{num} units {verb}" for num, verb in words if num)
    again = len(state.reasons)
    return f"{said}, {again} done again" if said and again else said


def stood_in(state: StageState) -> str:
    """Words for a stage that was finished without some of its units."""
    stage: Any = state.planned.stage
    lines = [f"  {unit}: {message}" for unit, message in state.failures.items()]
    return "\n".join(
        [
            f"{state.name}: ATTENTION: {len(state.failures)} of {state.num_units} units failed, "
            f"{stage.stand_in} stands in for them, as min_success allows; "
            f"`ediffi cache retry {state.name}` tries them again",
            *lines,
        ]
    )


def report(state: StageState) -> str:
    """The first failure first, then the others, a line each."""
    lines = [f"  {unit}: {message}" for unit, message in state.failures.items()]
    if state.is_cut_short:
        lines.append("  the other units were ended or not begun; the same command does them")
    return (
        f"stage {state.name}: {len(state.failures)} of {state.num_units} units failed\n"
        + "\n".join(lines)
    )
