"""Whose process a run is, and whether it lives: also across restarts, containers, set clocks."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


def process_start(pid: int | None = None) -> float:
    """When a process started: seconds since the machine did, which no setting of clocks changes.

    Args:
        pid: None for this process.

    Raises:
        ProcessLookupError: there is no such process.
    """
    number = os.getpid() if pid is None else pid
    if not (_PROC / "self" / "stat").exists():
        return _process_start_elsewhere(number)
    try:
        text = (_PROC / str(number) / "stat").read_text()
    except FileNotFoundError as error:
        raise ProcessLookupError(f"no process {number}") from error
    fields = text.rpartition(")")[2].split()
    if fields[0] in "ZX":  # it has ended, and its parent has not asked yet
        raise ProcessLookupError(f"process {number} has ended")
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _process_start_elsewhere(pid: int) -> float:
    """Outside Linux: by the wall clock."""
    import psutil

    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess as error:
        raise ProcessLookupError(f"no process {pid}") from error


def is_running(pid: int, started: float | None = None) -> bool:
    """Whether a process of this machine lives.

    Args:
        started: its `process_start`; None: whichever process has the number.
    """
    try:
        found = process_start(pid)
    except ProcessLookupError:
        return False
    return started is None or found == started


def process_table() -> str:
    """Name of the table that process numbers here are of.

    Two machines may share a host name; under host networking a container has its machine's name
    and process numbers of its own; and a restarted machine gives its numbers out anew.
    """
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return socket.gethostname()


@dataclass(frozen=True)
class Owner:
    """The driver of a run.

    Attributes:
        process_started: tells it from a later process of the same number, see `process_start`.
        process_table: which one `pid` is of, see `process_table`; "" where nobody noted it.
    """

    run_id: str
    host: str
    pid: int
    process_started: float
    process_table: str = ""

    @classmethod
    def of_this_process(cls, run_id: str) -> Owner:
        return cls(run_id, socket.gethostname(), os.getpid(), process_start(), process_table())

    @property
    def is_gone(self) -> bool:
        """Whether it ran on this machine and is no more; False where that cannot be seen."""
        if self.host != socket.gethostname():
            return False
        if not self.process_table:  # an earlier version's: all that is sure is a number not in use
            return not is_running(self.pid)
        if self.process_table != process_table():
            return False
        return not is_running(self.pid, self.process_started)

    @property
    def is_here(self) -> bool:
        """Whether it is a living process that we can see."""
        is_ours = self.process_table in ("", process_table())
        is_same = self.host == socket.gethostname() and is_ours
        return is_same and is_running(self.pid, self.process_started)

    def __str__(self) -> str:
        return f"run {self.run_id or 'unknown'} on {self.host or 'an unknown host'}"
