"""How far a stage of the running plan is, and words for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipelines.execute import Task
from pipelines.planning import PlannedStage
from pipelines.recipe import Resources


@dataclass
class StageState:
    """A stage in the loop. `failures` maps a unit that failed for good to what it said."""

    planned: PlannedStage
    resources: Resources
    state: str = "waiting"  # waiting | running | ran | cached | failed | blocked
    # Units not looked at yet: a generator, for there may be very many.
    pending: Iterator[Task] = field(default_factory=lambda: iter(()))
    queue: deque[Task] = field(default_factory=deque)  # the next unit, retries, amendments
    num_units: int = 0
    num_in_flight: int = 0
    num_done: int = 0
    num_kept: int = 0  # had a receipt at the start
    num_taken_over: int = 0  # had been done under an earlier fingerprint
    reasons: dict[str, str] = field(default_factory=dict)  # unit -> why it was done again
    failures: dict[str, str] = field(default_factory=dict)
    is_hopeless: bool = False  # a failure lies in the work itself, not in the surroundings
    num_rows_sent: dict[str, int] = field(default_factory=dict)
    notices_told: dict[str, set[str]] = field(default_factory=dict)
    grids_sent: dict[str, set[str]] = field(default_factory=dict)  # unit -> file names
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
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
    def can_stop(self) -> bool:
        """Whether a unit saves and ends when asked to: training does, which is what gangs do."""
        return self.planned.stage.gang

    @property
    def is_over(self) -> bool:
        return self.state in {"ran", "cached", "failed", "blocked"}

    def has_next(self) -> bool:
        """Whether a unit waits to be dispatched; it then heads the queue."""
        if not self.queue and (task := next(self.pending, None)) is not None:
            self.queue.append(task)
        return bool(self.queue)


def kept(state: StageState) -> str:
    """What was not done: `40 units kept, 59 taken over`."""
    words = [(state.num_kept, "kept"), (state.num_taken_over, "taken over")]
    said = ", ".join(f"{num} units {verb}" for num, verb in words if num)
    again = len(state.reasons)
    return f"{said}, {again} done again" if said and again else said


def report(state: StageState) -> str:
    """The first failure first, then the others, a line each."""
    lines = [f"  {unit}: {message}" for unit, message in state.failures.items()]
    return (
        f"stage {state.name}: {len(state.failures)} of {state.num_units} units failed\n"
        + "\n".join(lines)
    )
