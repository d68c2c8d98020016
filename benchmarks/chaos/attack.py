"""One store under attack: start, strike, start again, until the command succeeds."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.chaos import processes
from benchmarks.chaos.bucket import Bucket
from benchmarks.chaos.nodes import Nodes
from benchmarks.chaos.outage import KINDS as OUTAGES
from benchmarks.chaos.scene import MAX_UNITS_AT_ONCE, Scene, last_words
from benchmarks.chaos.witness import Witness, wait_a_while
from pipelines.store.ledger import Ledger

PATIENCE_S = 600.0
MOST_STARTS_IN_VAIN = 5  # that no blow explains, such as those on a machine too busy for Ray
LINGER_S = 30.0  # for processes of killed drivers and nodes to notice it
START_S = 12.0  # a run has Ray and its first workers by then
TRAINING = ("base", "experts")
RETRYABLE = 3  # the exit code that asks for the same command again

# What may be done to a run on this machine, on nodes of a cluster, on a store that may fail.
ON_MACHINE = ("driver", "trainer", "actor", "told")
ON_NODES = ("node", "raylet", "head", "driver", "trainer", "actor")
ON_BUCKET = (*OUTAGES, "driver", "trainer", "actor")
# Units that one blow may cost. In an outage each of those in flight may fail at every attempt.
COSTS = {
    "trainer": 1,
    "actor": 1,
    **dict.fromkeys(("driver", "told", "node", "raylet", "head"), MAX_UNITS_AT_ONCE),
    **dict.fromkeys(OUTAGES, 3 * MAX_UNITS_AT_ONCE),
}


@dataclass(frozen=True, kw_only=True)
class Blow:
    """What was done, and when.

    Attributes:
        kind: one of `COSTS`.
        after_s: seconds since the driver was started.
        under_way: stages that were being worked on.
        lasted_s: of an outage.
    """

    kind: str
    after_s: float
    under_way: Sequence[str]
    lasted_s: float = 0.0


@dataclass
class Attack:
    """Blows at runs of one scene into one store.

    Args:
        store: a directory or a URL.
        place: an empty directory in which the command runs.
        kinds: what to do, in this order; what finds no moment before the end is left out.
        nodes: the cluster to run on; None: each run starts Ray itself.
        bucket: where the store lies, if it does.
    """

    scene: Scene
    store: str
    place: Path
    kinds: Sequence[str]
    chance: random.Random
    nodes: Nodes | None = None
    bucket: Bucket | None = None
    blows: list[Blow] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    done_again: list[str] = field(default_factory=list)
    survivors: list[str] = field(default_factory=list)
    wrong_codes: list[str] = field(default_factory=list)
    num_done_at_ends: int = 0  # units that were done whenever a run ended before the last

    def run(self) -> None:
        """Until the command succeeds.

        Raises:
            RuntimeError: it does not come to an end.
        """
        self._kin: list[psutil.Process] = []
        self._pending = list(self.kinds)
        with Witness(Ledger.at(self.store).store) as self._witness:
            while not self.codes or self.codes[-1] != 0:
                if len(self.codes) > len(self.kinds) + MOST_STARTS_IN_VAIN:
                    raise RuntimeError(f"no end after {len(self.codes)} starts\n{self._story()}")
                self.codes.append(self._run_once())
                if self.codes[-1] != 0:
                    self.num_done_at_ends += self._witness.num_receipts
        if self._witness.error is not None:
            raise self._witness.error
        self.done_again = list(self._witness.done_again)
        processes.wait_for_end(self._kin, LINGER_S)
        alive = [one.pid for one in self._kin if one.is_running()]
        self.survivors = [str(one) for one in processes.at_work(alive)]

    @property
    def most_begun(self) -> int:
        """How many attempts the blows may have cost beside one a unit."""
        return sum(COSTS[blow.kind] for blow in self.blows)

    def _run_once(self) -> int:
        driver = self.scene.start(self.store, self.place, self._environment())
        try:
            return self._torment(driver)
        finally:  # it lives in a session of its own: nobody else would end it
            if driver.poll() is None:
                processes.kill(processes.family([driver.pid]))
                driver.wait()

    def _torment(self, driver: subprocess.Popen[bytes]) -> int:
        """Strike while there is something left to do; returns the exit code."""
        self._started = time.monotonic()
        while self._pending and self._wait_for_moment(driver, self._pending[0]):
            kind, after_s = self._pending[0], round(time.monotonic() - self._started, 2)
            under_way, lasted_s = self._witness.under_way, self._strike(kind, driver)
            if lasted_s is None:
                continue  # whom it was to hit has just ended
            del self._pending[0]
            blow = Blow(kind=kind, after_s=after_s, under_way=under_way, lasted_s=lasted_s)
            self.blows.append(blow)
        try:
            code = driver.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no end in {PATIENCE_S:.0f} s\n{self._story()}") from None
        last = self.blows[-1].kind if self.blows else "nothing"
        if code not in (0, RETRYABLE) and (code, last) != (-signal.SIGKILL, "driver"):
            self.wrong_codes.append(f"exit code {code} after {last}: {last_words(self.place, 3)}")
        return code

    def _environment(self) -> Mapping[str, str]:
        on_nodes = {"RAY_ADDRESS": self.nodes.address} if self.nodes else {}
        return on_nodes | (self.bucket.environment if self.bucket else {})

    def _story(self) -> str:
        blows = "\n".join(f"  {blow}" for blow in self.blows)
        return f"after\n{blows}\nit said\n{last_words(self.place)}"

    # -- moments ---------------------------------------------------------------------------------

    def _wait_for_moment(self, driver: subprocess.Popen[bytes], kind: str) -> bool:
        """Wait until it is time; False if the driver ended before."""
        if kind in ("trainer", "actor"):
            return self._wait_for_worker(driver, kind)
        if self.chance.random() < 0.3:  # by the clock: while Ray starts, while a stage is planned
            return wait_a_while(self.chance.uniform(0.0, START_S), lambda: _is_over(driver))
        wanted = self._witness.num_commits + self.chance.randint(1, 5)
        while self._witness.num_commits < wanted:  # by what was finished: around publishing
            if _is_over(driver):
                return False
            time.sleep(0.005)
        pause_s = self.chance.choice([0.0, 0.05, 0.5, 3.0]) * self.chance.random()
        return wait_a_while(pause_s, lambda: _is_over(driver))

    def _wait_for_worker(self, driver: subprocess.Popen[bytes], kind: str) -> bool:
        pause_s = self.chance.uniform(0.0, 5.0)
        while True:
            if self._workers(driver, kind):
                if not wait_a_while(pause_s, lambda: _is_over(driver)):
                    return False
                if self._workers(driver, kind):
                    return True
                pause_s /= 2
            if not wait_a_while(0.05, lambda: _is_over(driver)):
                return False

    def _workers(self, driver: subprocess.Popen[bytes], kind: str) -> list[psutil.Process]:
        """Processes that train, or that do anything else."""
        trains = any(name.startswith(TRAINING) for name in self._witness.under_way)
        return self._at_work(driver) if trains == (kind == "trainer") else []

    def _at_work(self, driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
        return processes.at_work(self.nodes.pids() if self.nodes else [driver.pid])

    # -- blows -----------------------------------------------------------------------------------

    def _strike(self, kind: str, driver: subprocess.Popen[bytes]) -> float | None:
        """Do it; returns how long it lasted, None if there was nothing to hit."""
        match kind:
            case "driver":
                self._kin += processes.family([driver.pid])
                driver.kill()
                driver.wait()
            case "told":
                self._kin += processes.family([driver.pid])
                driver.terminate()
            case "trainer" | "actor":
                workers = self._workers(driver, kind)
                if not workers:
                    return None
                processes.kill([self.chance.choice(workers)])
            case "node" | "raylet":
                assert self.nodes is not None
                self._kin += self.nodes.kill_one(self.chance, with_workers=kind == "node")
            case "head":
                assert self.nodes is not None
                self._kin += self.nodes.kill_all()
            case _:
                assert self.bucket is not None
                lasts_s = round(self.chance.uniform(0.5, 15.0), 2)
                self.bucket.outage.last(kind, lasts_s)
                return lasts_s
        return 0.0


def _is_over(driver: subprocess.Popen[bytes]) -> bool:
    return driver.poll() is not None
