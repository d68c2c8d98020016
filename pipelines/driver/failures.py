"""What a failed unit says: its own exception, out of Ray's wrapping of tasks and gangs."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

import ray

from pipelines.errors import RetryableError, UserError
from pipelines.store.lease import Fenced

if TYPE_CHECKING:
    from ediffi.train.stop import Stopped

_log = logging.getLogger(__name__)

# A process or its node went away; what it was doing may go on somewhere out of reach.
_LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.OwnerDiedError,
)


class TookTooLong(Exception):
    """A unit was still at work when its time was over, and was ended."""


class NotBegun(RetryableError):
    """No worker could be had for a unit in time."""


def root_cause(error: BaseException) -> BaseException:
    """The exception that a unit raised, freed of Ray's wrapping of tasks and gangs."""
    while True:
        failures = getattr(error, "worker_failures", None) or {}
        inner = getattr(error, "cause", None) or next(iter(failures.values()), None)
        if not isinstance(inner, BaseException) or inner is error:
            return error
        error = inner


def root_message(error: BaseException) -> str:
    """What the unit's own exception said, or how its worker ended."""
    cause = root_cause(error)
    if isinstance(cause, _LOST):
        return _how_it_was_lost(cause)
    text = str(cause).strip()
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__


def _how_it_was_lost(error: Exception) -> str:
    """Ray's paragraph on a dead worker in one line; the paragraph goes to the log."""
    text = str(error)
    _log.info("%s: %s", type(error).__name__, text)
    process = re.search(r"pid: (\d+)", text)
    place = re.search(r"\bip: ([\w.:]+)", text)
    why = re.search(r"exit detail: ([^.]+)|because ([^.]+)|^([^.\n]+)", text)
    who = f" {process[1]}" if process else ""
    where = f" on {place[1]}" if place else ""
    words = next((one for one in why.groups() if one), "") if why else ""
    return f"its worker process{who}{where} died: {words.strip() or type(error).__name__}"


def stopped(error: BaseException) -> Stopped | None:
    """The unit's word that it ended because it was asked to, with its state saved."""
    from ediffi.train.stop import Stopped  # imports torch: only where something went wrong

    cause = root_cause(error)
    return cause if isinstance(cause, Stopped) else None


def fenced(error: BaseException) -> Fenced | None:
    """The store's word that somebody else works on the stage, or on the unit, now."""
    cause = root_cause(error)
    return cause if isinstance(cause, Fenced) else None


def is_hopeless(error: BaseException) -> bool:
    """Whether trying again cannot help: the input itself is wrong, or training has diverged."""
    return isinstance(root_cause(error), ValueError | ArithmeticError | UserError | NotBegun)


def is_passing(error: BaseException) -> bool:
    """Whether the surroundings failed: an outage, or a worker that died."""
    return isinstance(root_cause(error), (RetryableError, *_LOST))


def is_lost(error: BaseException) -> bool:
    """Whether nobody can say what became of the worker."""
    return isinstance(root_cause(error), (TookTooLong, *_LOST))
