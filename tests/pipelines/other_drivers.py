"""Other drivers for the tests of leases: processes of their own, which can be stopped and killed.

Each is `python -m tests.pipelines.other_drivers VERB ...`; it prints a JSON object a line.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.stage import Outcome, Unit, Workspace
from pipelines.store import lease
from pipelines.store.lease import Held, Lease
from pipelines.store.location import location
from pipelines.store.processes import Owner
from pipelines.worker.execute import Task, execute
from tests.pipelines.fake_stages import FakeStage

ROOT = Path(__file__).parents[2]
_said = 1  # file descriptor


class Sleeper(FakeStage):
    """Its process stops in the middle of a unit, as one on a machine that froze."""

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        tell(state="stops")
        os.kill(os.getpid(), signal.SIGSTOP)
        (workspace.scratch / f"{unit.id}.txt").write_text("late")
        return Outcome(files=[f"{unit.id}.txt"])


def tell(**values: Any) -> None:
    os.write(_said, json.dumps(values).encode() + b"\n")


def owner(run_id: str, host: str) -> Owner:
    """This process, or what looks like one of another host."""
    here = Owner.of_this_process(run_id)
    return here if host == "here" else Owner(run_id, host, here.pid, here.process_started, "")


def hold(directory: str, host: str, ttl_s: str) -> None:
    """Take the lease, tell the token; when asked, tell whether it was lost."""
    found = lease.acquire(location(directory), owner("holder", host), ttl_s=float(ttl_s))
    assert isinstance(found, Lease)
    tell(token=found.token)
    sys.stdin.readline()
    tell(lost=is_lost(found))
    found.release()


def is_lost(held: Lease) -> bool:
    """Whether the heartbeat sees in time that somebody else has it."""
    until = time.monotonic() + 20.0
    while not held.lost and time.monotonic() < until:
        time.sleep(0.05)
    return held.lost


def race(directory: str, starts: str) -> None:
    """Try to take the lease once, at the same moment as others."""
    time.sleep(max(float(starts) - time.time(), 0))
    found = lease.acquire(location(directory), Owner.of_this_process(f"run-{os.getpid()}"))
    tell(token=found.token, is_held_by_other=isinstance(found, Held))
    sys.stdin.readline()  # a winner that ended would be gone, and its lease free


def relay(directory: str, log: str, num_turns: str) -> None:
    """Take the lease again and again; note in a shared log when each turn began and ended."""
    me = Owner.of_this_process(f"run-{os.getpid()}")
    turns = 0
    while turns < int(num_turns):
        found = lease.acquire(location(directory), me)
        if isinstance(found, Held):
            time.sleep(0.001)
            continue
        with open(log, "a") as stream:
            stream.write(f"begin {found.token}\n")
            stream.flush()
            time.sleep(0.001)
            stream.write(f"end {found.token}\n")
        found.release()
        turns += 1
    tell(done=turns)


def work(store: str, fingerprint: str) -> None:
    """Take the lease on a stage and do a unit of it; stop in the middle."""
    record = Task(
        store=store,
        stage=Sleeper(name="first"),
        fingerprint=fingerprint,
        inputs={},
        unit=Unit(id="a"),
    ).record
    found = lease.acquire(record.directory, owner("sleeper", "here"), ttl_s=1.0)
    assert isinstance(found, Lease)
    task = Task(
        store=store,
        stage=Sleeper(name="first"),
        fingerprint=fingerprint,
        inputs={},
        unit=Unit(id="a", key="k:1"),
        run_id="sleeper",
        token=found.token,
    )
    try:
        execute(task)
    except lease.Fenced as error:
        tell(fenced=str(error), lost=is_lost(found))


class Driver:
    """Such a process, seen from the test."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.pipelines.other_drivers", *words],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def says(self) -> Any:
        """Its next word."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it ended with {self.process.wait()}"
        return json.loads(line)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def let_go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@contextmanager
def driver(*words: str) -> Iterator[Driver]:
    """Another driver, gone when the context ends."""
    other = Driver(*words)
    try:
        yield other
    finally:
        other.process.kill()
        other.process.communicate()


if __name__ == "__main__":
    _said = os.dup(1)  # what a unit prints goes into its log
    globals()[sys.argv[1]](*sys.argv[2:])
