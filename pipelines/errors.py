"""What can go wrong in a run, and the exit code each kind ends the process with.

Exception
├── UserError        2  the recipe, a path or a request is wrong: fix it and run again
├── RetryableError   3  the surroundings failed: the same command may succeed
└── StageFailed      1  units of a stage failed for good; what was finished stays finished
"""

from __future__ import annotations


class UserError(Exception):
    """The user asked for something impossible; the message names it and says what to do."""

    exit_code = 2


class RetryableError(Exception):
    """The surroundings failed (no room, a lost node); running again may succeed."""

    exit_code = 3


class StageFailed(Exception):
    """One or more units of a stage failed after all their attempts."""

    exit_code = 1
