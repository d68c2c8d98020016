"""What can go wrong in a run, and the exit code each kind ends the process with.

Exception
├── UserError        2  the recipe, a path or a request is wrong: fix it and run again
│   └── Damaged         a file of the store is not what was written there
├── RetryableError   3  the surroundings failed: the same command may succeed
│   ├── Fenced          (in `store.lease`) another driver has taken the work over
│   └── Unreachable     (in `stage_job`) the cluster does not tell of its jobs
└── StageFailed      1  units of a stage failed for good; what was finished stays finished
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class UserError(Exception):
    """The user asked for something impossible; the message names it and says what to do."""

    exit_code = 2


class Damaged(UserError, ValueError):
    """A file of the store is half there, or something else wrote it."""


class RetryableError(Exception):
    """The surroundings failed (no room, a lost node); running again may succeed.

    Attributes:
        record: of the run that it ended, as in `runs/<run_id>.json`; None if there was none yet.
    """

    exit_code = 3
    record: Mapping[str, Any] | None = None


class StageFailed(Exception):
    """One or more units of a stage failed after all their attempts.

    Attributes:
        record: of the run that it ended, as in `runs/<run_id>.json`; None outside of one.
    """

    exit_code = 1
    record: Mapping[str, Any] | None = None
