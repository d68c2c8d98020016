"""Leaving Ray while other threads of the process go on."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pipelines.driver import ray_cluster

# Forgets references to results in cycles, from when Ray's end begins until it is over. Without
# care their collection ended this process with code 1 every time.
FORGETFUL = '''
import gc, threading, time
import ray
from ray._private.worker import global_worker
from pipelines.driver.ray_cluster import connect, disconnect

class Knot:
    """Only a collection frees it."""

    def __init__(self, reference):
        self.me, self.reference = self, reference

def forget():
    while global_worker.connected:
        time.sleep(0.0001)
    while references and hasattr(global_worker, "core_worker"):
        for _ in range(10):
            Knot(references.pop())
        time.sleep(0.0005)

connect()
result = ray.put(1)
references = [ray.ObjectRef(result.binary()) for _ in range(100_000)]
gc.set_threshold(5)
thread = threading.Thread(target=forget)
thread.start()
disconnect()
thread.join()
print("forgotten:", 100_000 - len(references), "collects again:", gc.isenabled())
'''


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_forgotten_references_do_not_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a driver's other threads collect while Ray goes down cannot hit a Ray half gone."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ended = subprocess.run(
        [sys.executable, "-c", FORGETFUL], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    told = ended.stdout.split()
    assert int(told[1]) > 0
    assert told[-1] == "True"


SLEEP = "import time; time.sleep(600)"


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Children of this process that look like two of Ray's; Ray itself is not there."""
    monkeypatch.setattr("ray.shutdown", lambda: None)
    paths = {"autoscaler": "ray/autoscaler/_private/monitor.py", "log": "ray/_private/monitor.py"}
    started = {
        name: subprocess.Popen([sys.executable, "-c", SLEEP, f"/lib/{path}"])
        for name, path in paths.items()
    }
    yield started
    for child in started.values():
        child.kill()
        child.wait()


def test_only_the_autoscaler_is_not_waited_for(
    children: dict[str, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a cluster on this machine one process is killed before Ray would ask it to leave."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray_cluster.disconnect()
    assert children["autoscaler"].wait(10) == -signal.SIGKILL
    assert children["log"].poll() is None


def test_nothing_of_a_joined_cluster_is_killed(
    children: dict[str, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happens to be our child may be a head that others use."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    ray_cluster.disconnect()
    assert [child.poll() for child in children.values()] == [None, None]
