"""The end of a run that was told to end: what can keep its state is given time to do so."""

from __future__ import annotations

import time
from collections.abc import Callable

from pipelines.driver.flights import Flights
from pipelines.store.stopping import StopMark


def let_training_save(
    flights: Flights, mark: StopMark, say: Callable[[str], None], turn: Callable[[], None]
) -> None:
    """Ask the units that can keep their state to do so, and give them their time.

    The others are not waited for: what they have begun is short and done again.

    Args:
        say: tells a person.
        turn: collects what is over; called until nothing is waited for any more.
    """
    units = _saving(flights)
    if not units:
        return
    names = ", ".join(f"{name} ({deadline_s:g} s)" for name, deadline_s in units.items())
    say(f"told to end: waits for {names} to save; once more to leave at once")
    started = time.monotonic()
    try:
        mark.put()
        while any(time.monotonic() - started < units[name] for name in _saving(flights)):
            turn()
    finally:
        mark.remove()
    for name in _saving(flights):
        say(f"{name} has not saved in time; its last checkpoint counts")


def _saving(flights: Flights) -> dict[str, float]:
    """Units in flight that can save, with the seconds they may take."""
    return {
        f"{state.name}/{task.unit.id}": state.resources.stop_deadline_s
        for state, task in flights
        if state.can_stop
    }
