"""Which processes belong to a run, and which of them do units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress

import psutil

WORKER = "ray::UnitWorker.run"  # Ray's title of an actor that is doing a unit
GANG_WORKER = "ray::RayTrainWorker"


def family(pids: Iterable[int]) -> list[psutil.Process]:
    """All processes that these have started, and they themselves, as far as they live."""
    found: dict[int, psutil.Process] = {}
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(pid)
            for one in [parent, *parent.children(recursive=True)]:
                found[one.pid] = one
    return list(found.values())


def at_work(pids: Iterable[int]) -> list[psutil.Process]:
    """Workers below these processes that are doing a unit now, by their process ids."""
    found = []
    for one in family(pids):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if _title(one).startswith((WORKER, GANG_WORKER)):
                found.append(one)
    return sorted(found, key=lambda one: one.pid)


def kill(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL for each; psutil makes sure that no new process of the same number is hit."""
    for one in processes:
        with suppress(psutil.NoSuchProcess):
            one.kill()


def wait_for_end(processes: Sequence[psutil.Process], deadline_s: float) -> list[psutil.Process]:
    """Wait for all to be gone; those that are not when the time is over."""
    _, alive = psutil.wait_procs(list(processes), timeout=deadline_s)
    return list(alive)


def _title(process: psutil.Process) -> str:
    return " ".join(process.cmdline()[:1])
