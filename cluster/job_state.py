"""What all schedulers share: where a job stands, what goes along with it, and the error."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cluster.profile import Profile

Standing = Literal["waiting", "running", "finished", "failed", "cancelled", "unknown"]
ENDED: tuple[Standing, ...] = ("finished", "failed", "cancelled")
MAX_FAILURES = 5  # in a row, of a scheduler that is asked again and again


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What the scheduler says of a job.

    Attributes:
        name: "unknown" is a job that the scheduler does not know, or no longer.
        native: the scheduler's own word.
        reason: why, as far as the scheduler tells; one line.
    """

    name: Standing
    native: str = ""
    reason: str = ""

    @property
    def is_over(self) -> bool:
        return self.name in ENDED


class SchedulerError(Exception):
    """A scheduler cannot be asked, or refuses; the message holds its words and the next step.

    Attributes:
        may_pass: whether the same command may do later, such as when it could not be reached.
    """

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class AlreadyThereError(SchedulerError):
    """A job of that name is there already: somebody was faster."""


class Patience:
    """Lets failures pass while a job is followed, if they may; but not MAX_FAILURES in a row."""

    def __init__(self, *, follow: bool) -> None:
        self._limit, self._num_failures = MAX_FAILURES if follow else 1, 0

    def bear(self, error: SchedulerError) -> None:
        """Raise the error again if it will not pass, or has come too often."""
        self._num_failures += 1
        if not error.may_pass or self._num_failures >= self._limit:
            raise error

    def renew(self) -> None:
        """Something went well: what failed before counts no longer."""
        self._num_failures = 0


def values_of(profile: Profile) -> Mapping[str, str]:
    """What goes along with a job on this machine: handed over, and never written down.

    Raises:
        SchedulerError: a variable is not set.
    """
    for source in profile.passed.values():
        if source not in os.environ:
            raise SchedulerError(
                f"{source} is not set here, so that it cannot go along: set it, or take it out of "
                f"pass_environment or webhook in profile {profile.name}"
            )
    return {name: os.environ[source] for name, source in profile.passed.items()}
