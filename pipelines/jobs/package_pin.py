"""The Python packages that a job must find: those of a requirements.lock that travels with it."""

from __future__ import annotations

import hashlib
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipelines.errors import UserError

LOCK_NAME = "requirements.lock"
_LINE = re.compile(r"([A-Za-z0-9._-]+)==([^\s;]+)\s*(;.*)?$")
_MAX_SHOWN = 8


def lock_of_checkout() -> str:
    """The text of the lock beside the code; "" where the code was installed without it."""
    path = Path(__file__).parents[2] / LOCK_NAME
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def digest(lock: str) -> str:
    """The name of an environment: comments and the order of lines say nothing."""
    lines = sorted(line.strip() for line in lock.splitlines() if _LINE.match(line.strip()))
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def differences(lock: str) -> list[str]:
    """Packages that are not here as locked; those with a marker may be absent."""
    found = []
    for line in lock.splitlines():
        if match := _LINE.match(line.strip()):
            package, locked, marker = match.groups()
            installed = _installed(package)
            if installed != locked and not (marker and not installed):
                found.append(f"{package} {installed or 'missing'} (locked {locked})")
    return found


def check(expected: str, lock: str) -> None:
    """Refuse to start in another environment than the one that was submitted.

    Args:
        expected: what `digest` said of the lock at the submission.
        lock: the text that came along.

    Raises:
        UserError: the lock is missing or another one, or packages differ; the first are named.
    """
    if not lock:
        raise UserError(
            f"--expect-environment: no {LOCK_NAME} lies beside the recipe to compare with; submit "
            "the job again"
        )
    if digest(lock) != expected:
        raise UserError(
            f"--expect-environment: the {LOCK_NAME} beside the recipe is {digest(lock)}, expected "
            f"was {expected}; submit the job again"
        )
    if wrong := differences(lock):
        more = f" and {len(wrong) - _MAX_SHOWN} more" if len(wrong) > _MAX_SHOWN else ""
        raise UserError(
            f"{len(wrong)} packages of {sys.prefix} are not those that this job was submitted "
            f"with: {', '.join(wrong[:_MAX_SHOWN])}{more}; install the lock there, use an image "
            "that has it, or say `pin: none` in the profile"
        )


def _installed(package: str) -> str:
    """The version without its local part ("2.14.1+cu130" is release 2.14.1), or ""."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return ""
