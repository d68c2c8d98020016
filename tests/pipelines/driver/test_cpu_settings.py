"""Tests of pipelines.driver.cpu_settings: what a worker that trains on CPUs is started with."""

import os
import subprocess
import sys

import pytest

from pipelines.driver.cpu_settings import training_environment
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


def test_the_allocator_gives_memory_back() -> None:
    """Told to keep what it has, it grows without bound: ragged batches never fit what is free."""
    assert "MALLOC_CONF" not in training_environment(Resources())


def test_workers_with_gpus_are_left_alone() -> None:
    """There the CPU has little to do, and pinned memory goes another way."""
    assert training_environment(Resources(gpus=1)) == {}


def test_what_the_user_preloads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever chose an allocator has chosen."""
    monkeypatch.setenv("LD_PRELOAD", "libtcmalloc_minimal.so.4")
    assert training_environment(Resources()) == {}
