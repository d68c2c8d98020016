"""Tests of pipelines.cpu_settings: what a worker that trains on CPUs is started with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import cpu_settings as module
from pipelines.cpu_settings import num_pinned, pinned, training_environment
from pipelines.recipe import Resources


@pytest.fixture(autouse=True)
def nothing_preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on most machines."""
    monkeypatch.delenv("LD_PRELOAD", raising=False)


@pytest.mark.skipif(sys.platform != "linux", reason="Ray brings jemalloc on Linux alone")
def test_the_allocator_that_is_named_is_used() -> None:
    """A process started so has it in its memory, and complains of nothing."""
    code = "print('libjemalloc' in open('/proc/self/maps').read())"
    environment = {**os.environ, **training_environment(Resources())}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_workers_with_gpus_are_left_alone() -> None:
    """There the CPU has little to do, and pinned memory goes another way."""
    assert training_environment(Resources(gpus=1)) == {}


def test_what_the_user_preloads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever chose an allocator has chosen."""
    monkeypatch.setenv("LD_PRELOAD", "libtcmalloc_minimal.so.4")
    assert training_environment(Resources()) == {}


CLAIMANT = """
import os, sys, time
from pathlib import Path
from pipelines import cpu_settings
from pipelines.cpu_settings import pinned
cpu_settings._own_cores = lambda: os.sched_getaffinity(0)
with pinned(int(sys.argv[1]), Path(sys.argv[2])) as cores:
    print(sorted(cores), flush=True)
    time.sleep(60)
"""
linux = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux alone pins")


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """What this process may use, whatever surrounds it."""
    cores = os.sched_getaffinity(0)
    monkeypatch.setattr(module, "_own_cores", lambda: set(cores))
    return cores


@linux
def test_workers_of_a_machine_get_cores_of_their_own(two_cores: set[int], tmp_path: Path) -> None:
    """As many as there are; the next one is left free, and so is everyone afterwards."""
    with pinned(len(two_cores) - 1, tmp_path) as first:
        assert os.sched_getaffinity(0) == (first or two_cores)
        with pinned(1, tmp_path) as second:
            assert len(second) == 1
            assert not first & second
            with pinned(1, tmp_path) as third:
                assert third == frozenset()
        with pinned(1, tmp_path) as again:
            assert again == second
    assert os.sched_getaffinity(0) == two_cores


@linux
def test_death_frees_a_core(tmp_path: Path) -> None:
    """A worker that is killed leaves no claim behind that would keep others off."""
    every = str(len(os.sched_getaffinity(0)))
    command = [sys.executable, "-c", CLAIMANT, every, str(tmp_path)]
    found = []
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as one:
            assert one.stdout is not None
            found.append(one.stdout.readline())
            one.kill()
    assert found == [f"{sorted(os.sched_getaffinity(0))}\n"] * 2


@linux
def test_processes_that_read_data_run_everywhere(two_cores: set[int], tmp_path: Path) -> None:
    """They are forked from the pinned thread, and would only take its core from it."""
    with pinned(1, tmp_path):
        receiver, sender = os.pipe()
        if (child := os.fork()) == 0:
            os.write(sender, bytes(sorted(os.sched_getaffinity(0))))
            os._exit(0)
        os.waitpid(child, 0)
        assert set(os.read(receiver, 4096)) == two_cores


@linux
@pytest.mark.parametrize(
    ("kubernetes", "quota", "is_pinned"),
    [
        ("", "max 100000", True),
        ("", "", True),
        ("", "200000 100000", False),
        ("10.0.0.1", "max 100000", False),
    ],
)
def test_a_container_that_sees_all_cores_pins_none(
    kubernetes: str,
    quota: str,
    is_pinned: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Its neighbours would pin themselves to the same; one with cores of its own may."""
    monkeypatch.setattr(module, "_CGROUP", tmp_path)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    if kubernetes:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", kubernetes)
    if quota:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    num_seen = len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "cpu_count", lambda: num_seen)
    with pinned(1, tmp_path / "claims") as cores:
        assert bool(cores) == is_pinned
    monkeypatch.setattr(os, "cpu_count", lambda: num_seen + 1)
    with pinned(1, tmp_path / "claims") as cores:
        assert len(cores) == 1


def test_only_whole_cpus_are_pinned() -> None:
    """Workers that share a core must be free to take turns on all; with GPUs nothing is pinned."""
    found = [num_pinned(Resources(cpus=cpus)) for cpus in (0.0, 0.6, 1.0, 2.0)]
    assert found == [0, 0, 1, 2]
    assert num_pinned(Resources(cpus=4.0, gpus=1)) == 0
