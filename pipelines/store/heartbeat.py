"""Heartbeats in the background: one thread a process for all that has to show that it lives."""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

_log = logging.getLogger(__name__)

_AGAIN_FRACTION = 0.1  # of an interval: after a beat that failed, the next comes so soon


class Beating(Protocol):
    """What shows that it lives, every `interval_s` seconds."""

    @property
    def interval_s(self) -> float:
        """Seconds between two beats."""

    def beat(self) -> None:
        """Show it; may take its time, and may fail."""


class Heart:
    """Beats for all that was added; its thread ends when nothing is left.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._next: dict[Beating, float] = {}  # when each is due, by time.monotonic()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, one: Beating) -> None:
        with self._changed:
            self._next[one] = time.monotonic() + one.interval_s
            self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()

    def remove(self, one: Beating) -> None:
        with self._changed:
            self._next.pop(one, None)
            self._changed.notify()

    def _work(self) -> None:
        while (due := self._wait()) is not None:
            wait_s = due.interval_s
            try:
                due.beat()
            except Exception as error:  # each store has its own; the next beat may get through
                _log.warning("a heartbeat did not reach the store: %s", error)
                wait_s *= _AGAIN_FRACTION
            with self._changed:
                if due in self._next:
                    self._next[due] = time.monotonic() + wait_s

    def _wait(self) -> Beating | None:
        """What is due next, once it is; None when nothing is left."""
        with self._changed:
            while self._next:
                due = min(self._next, key=lambda one: self._next[one])
                wait_s = self._next[due] - time.monotonic()
                if wait_s <= 0:
                    return due
                self._changed.wait(wait_s)
            self._thread = None
            return None
