"""What a failed unit says: its own exception, out of Ray's wrapping of tasks and gangs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ray

from pipelines.errors import RetryableError, UserError

if TYPE_CHECKING:
    from ediffi.train.stop import Stopped


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


def stopped(error: BaseException) -> Stopped | None:
    """The unit's word that it ended because it was asked to, with its state saved."""
    from ediffi.train.stop import Stopped  # imports torch: only where something went wrong

    cause = root_cause(error)
    return cause if isinstance(cause, Stopped) else None


def is_hopeless(error: BaseException) -> bool:
    """Whether trying again cannot help: the input itself is wrong, or training has diverged."""
    return isinstance(root_cause(error), ValueError | ArithmeticError | UserError)


def is_passing(error: BaseException) -> bool:
    """Whether the surroundings failed: an outage, or a worker that died."""
    return isinstance(root_cause(error), RetryableError | ray.exceptions.RayActorError)
