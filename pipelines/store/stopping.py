"""Being told to end: the driver hears a signal, and workers on every node hear of it in the store.

The driver leaves a mark, `runs/<run_id>.stop`. Units that can keep their state, those of training,
look for it, save and end. The mark bears the run's id, so one left by a killed driver stops nobody.

A node that is about to be taken away may say so by a file, which whoever watches over it writes;
its path is in EDIFFI_PREEMPTION_FILE. On the driver's node that is as good as SIGTERM, on a
worker's the unit saves and goes on elsewhere.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from pipelines.errors import RetryableError
from pipelines.store.location import Location, is_remote, write_atomically

_log = logging.getLogger(__name__)

PREEMPTION_VARIABLE = "EDIFFI_PREEMPTION_FILE"
LOOK_S = 1.0  # a worker looks for the mark at most so often
LOOK_IN_BUCKET_S = 5.0  # there a look is a request, and training waits for it

_is_terminated = threading.Event()  # this process has been sent SIGTERM


def preemption_notice() -> str:
    """The file by which this node says that it is about to be taken away; "" while it does not."""
    path = os.environ.get(PREEMPTION_VARIABLE, "")
    return path if path and Path(path).exists() else ""


class Interruption:
    """SIGTERM and Ctrl-C as a wish to end, while the context is open; the second raises at once.

    The node's own notice is such a wish too.

    Attributes:
        error: what to raise once everything is in order; None while nobody wants to end.
    """

    def __init__(self) -> None:
        self.error: KeyboardInterrupt | RetryableError | None = None
        self._before: dict[int, Any] = {}
        self._next_look = 0.0

    def look(self) -> KeyboardInterrupt | RetryableError | None:
        """The wish to end, if there is one by now."""
        if self.error is None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_S
            if notice := preemption_notice():
                self.error = RetryableError(
                    f"told to end: this node is about to be taken away ({notice} is there); run "
                    "the same command elsewhere to go on"
                )
        return self.error

    def obey(self) -> None:
        """Raise the wish to end, if there is one by now."""
        if (wish := self.look()) is not None:
            raise wish

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup: let it be
                self._before[number] = signal.getsignal(number)
        self.listen()
        return self

    def listen(self) -> None:
        """Hear the signals again, after something else has taken them for itself."""
        for number in self._before:
            signal.signal(number, self._note)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.error is not None
        name = signal.Signals(number).name
        told = RetryableError(f"told to end ({name}); run the same command to go on")
        self.error = KeyboardInterrupt() if number == signal.SIGINT else told
        if again:
            raise self.error


class StopMark:
    """The word in the store that a run's units shall save and end."""

    def __init__(self, store: Location, run_id: str) -> None:
        self._path = store / "runs" / f"{run_id}.stop"

    def put(self) -> None:
        write_atomically(self._path, "")

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def is_there(self) -> bool:
        return self._path.exists()


class StopListener:
    """Says, when called, whether this worker shall save and end.

    Args:
        mark: the run's; None on workers that others tell.
    """

    def __init__(self, mark: StopMark | None, *, look_s: float = LOOK_S) -> None:
        self._mark, self._look_s = mark, look_s
        self._next_look = self._next_look_here = 0.0
        self._is_asked = self._is_taken_away = False

    @classmethod
    def of(cls, store: Location, run_id: str, *, rank: int) -> StopListener:
        """For a worker of a run; in a gang rank 0 looks for all, since one yes is enough."""
        mark = StopMark(store, run_id) if run_id and rank == 0 else None
        return cls(mark, look_s=LOOK_IN_BUCKET_S if is_remote(store) else LOOK_S)

    def __call__(self) -> bool:
        if self._mark is not None and time.monotonic() >= self._next_look:
            try:
                self._is_asked = self._mark.is_there()
            except Exception as error:  # each store has its own; a lost look costs a deadline
                _log.warning("could not look whether to stop: %s", error)
            self._next_look = time.monotonic() + self._look_s
        if time.monotonic() >= self._next_look_here:
            self._next_look_here = time.monotonic() + LOOK_S
            self._is_taken_away = bool(preemption_notice())
        return self._is_asked or self._is_taken_away or _is_terminated.is_set()


def listen_for_sigterm() -> None:
    """Let SIGTERM to this process ask its units to save and end; called in its main thread.

    Training by one worker listens by itself. In a gang it runs in another thread, which Python
    gives no signals.
    """

    def note(number: int, frame: FrameType | None) -> None:
        _is_terminated.set()

    signal.signal(signal.SIGTERM, note)
