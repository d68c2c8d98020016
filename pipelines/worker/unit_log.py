"""What a unit says while it is done: a log file an attempt, in the store.

<store>/logs/<run_id>/<stage>/<unit>.<attempt>.log           of the one worker, or of rank 0
                             /<unit>.<attempt>.rank1.log     of the other workers of a gang

It holds what the worker's process, and those it starts, write to stdout and stderr meanwhile:
logging, warnings, words of native libraries. Both are led into a file in the directory for
temporary files, which a thread reads, line by line, into the log: with the time, without secrets,
up to a limit. A pipe would do too, until somebody fills it while holding Python's lock. What a
worker that was killed had still to say is taken out of that file by the next unit on its machine.

A log that cannot be written does not fail the unit; the worker's own stderr says so.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.store.location import Location, location
from pipelines.worker.unit_log_file import MAX_LOG_BYTES, LogFile, RawFile, recover

if TYPE_CHECKING:
    from pipelines.store.ledger import Ledger
    from pipelines.worker.execute import Task

POLL_S = 0.2
_NAME = re.compile(r"(.+)\.(\d+)(?:\.rank(\d+))?\.log")
_STDOUT, _STDERR = 1, 2
_is_taken = threading.Lock()  # a process has one stdout: one unit at a time


@dataclass(frozen=True, kw_only=True, order=True)
class UnitLog:
    """One log: of an attempt at a unit, by one worker."""

    stage: str
    unit: str
    attempt: int
    rank: int
    place: Location


def paths(ledger: Ledger, run_id: str) -> list[UnitLog]:
    """The logs of a run, those of its workers that still write included; sorted."""
    folder = ledger.store / "logs" / run_id
    found = []
    for name in _files_below(folder):
        stage, _, file = name.rpartition("/")
        if match := _NAME.fullmatch(file):
            unit, attempt, rank = match.groups(default="0")
            place = folder / name
            found.append(
                UnitLog(stage=stage, unit=unit, attempt=int(attempt), rank=int(rank), place=place)
            )
    return sorted(found, key=lambda log: (log.stage, log.unit, log.attempt, log.rank))


def _files_below(folder: Location) -> Iterator[str]:
    """Paths of all files in a folder and below, relative to it."""
    if not isinstance(folder, Path):
        root = folder.path.rstrip("/") + "/"
        found = folder.fs.find(folder.path)
        yield from (path.removeprefix(root) for path in found if path.startswith(root))
        return
    yield from (str(path.relative_to(folder)) for path in folder.rglob("*.log"))


@contextmanager
def unit_log(
    task: Task, *, rank: int = 0, max_bytes: int = MAX_LOG_BYTES, poll_s: float = POLL_S
) -> Iterator[None]:
    """Keep what is said in this context as the log of the task's attempt.

    A task of no run, such as a probe's, has none. Nor has a second unit in the same process at
    the same time: what it says stands in the log of the first.
    """
    if not task.run_id or not _is_taken.acquire(blocking=False):
        yield
        return
    try:
        with _open(task, rank, max_bytes, poll_s):
            yield
    finally:
        _is_taken.release()


def _open(task: Task, rank: int, max_bytes: int, poll_s: float) -> AbstractContextManager[None]:
    try:
        return _Capture(task, rank, max_bytes, poll_s).open()
    except OSError as error:
        _say(f"{task.stage.name}/{task.unit.id}: no log can be kept: {error}")
        return nullcontext()


class _Capture:
    """stdout and stderr of this process on their way into one log."""

    def __init__(self, task: Task, rank: int, max_bytes: int, poll_s: float) -> None:
        name = f"{task.unit.id}.{task.attempt}{f'.rank{rank}' if rank else ''}.log"
        store = location(task.store)
        place = store / "logs" / task.run_id / task.stage.name / name
        self._poll_s = poll_s
        recover(store, _say)
        self._log = LogFile(place, max_bytes=max_bytes)
        self._log.write(
            f"# run {task.run_id}  {task.stage.name}/{task.unit.id}  attempt {task.attempt}  "
            f"rank {rank}  host {os.uname().nodename}  pid {os.getpid()}"
        )
        self._raw = RawFile.new(self._log)
        self._saved: dict[int, int] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="unit log", daemon=True)

    @contextmanager
    def open(self) -> Iterator[None]:
        start, verdict = time.monotonic(), "done"
        handler = _python_logging()
        self._redirect()
        self._thread.start()
        try:
            yield
        except BaseException as error:
            verdict = f"ended by {type(error).__name__}"
            traceback.print_exc()  # where sys.stderr leads, which is here
            raise
        finally:
            if handler is not None:
                logging.getLogger().removeHandler(handler)
            self._restore()
            self._is_over.set()
            self._thread.join()
            self._finish(f"# {verdict} after {time.monotonic() - start:.1f} s")

    def _redirect(self) -> None:
        _flush()
        for number in (_STDOUT, _STDERR):
            self._saved[number] = os.dup(number)
            os.dup2(self._raw.number, number)

    def _restore(self) -> None:
        _flush()
        for number, before in self._saved.items():
            os.dup2(before, number)

    def _finish(self, last_line: str) -> None:
        """The last lines; then nothing is left of the temporary file."""
        try:
            self._pass_on(is_last=True)
            self._log.close(last_line)
            self._raw.remove()
        except Exception as error:  # every store has errors of its own
            _say(f"the log {self._log.place} is incomplete: {error}; its end: {self._log.local}")
        finally:
            for before in self._saved.values():
                os.close(before)

    def _follow(self) -> None:
        while not self._is_over.wait(self._poll_s):
            try:
                self._pass_on(is_last=False)
                self._log.send()
            except Exception as error:  # tried again, and told at the end if it stays
                self._tell_stderr(f"the log {self._log.place} cannot be written now: {error}")

    def _pass_on(self, *, is_last: bool) -> None:
        for line in self._raw.lines(is_last=is_last):
            self._tell_stderr(self._log.write(line))
        self._log.flush()
        self._raw.mark_read(shorten=self._log.is_full)

    def _tell_stderr(self, line: str) -> None:
        """Where stderr led before, as in the worker's own log that Ray keeps."""
        with suppress(OSError):
            os.write(self._saved[_STDERR], f"{line}\n".encode())


def _python_logging() -> logging.Handler | None:
    """Send log records to stderr, with names, unless the process already sends them somewhere."""
    root = logging.getLogger()
    if root.handlers:
        return None
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    root.addHandler(handler)
    return handler


def _flush() -> None:
    """Let go what Python and the C library hold back of stdout and stderr."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(ValueError, OSError):  # closed, or its reader is gone
            stream.flush()
    ctypes.CDLL(None).fflush(None)


def _say(text: str) -> None:
    print(f"ediffi: {text}", file=sys.stderr)
