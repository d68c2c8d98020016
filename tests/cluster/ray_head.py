"""A real Ray head on loopback that asks for a token, for tests that send jobs to it."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster import ray_jobs
from cluster.job_state import SchedulerError
from cluster.profile import Profile
from tests.infra.ports import free_ports

TOKEN = "a-token-for-this-test-alone-0123456789"
LOOPBACK = "127.0.0.2"  # Ray replaces 127.0.0.1 by an address that others reach
DEADLINE_S = 180


@dataclass
class Head:
    """A running head and the profile that leads to it.

    Attributes:
        logs: what Ray itself writes.
        address: where drivers join it.
    """

    profile: Profile
    logs: Path
    process: "subprocess.Popen[bytes]"
    address: str


def profile_at(address: str, **values: object) -> Profile:
    """A profile of a Ray cluster."""
    return Profile.from_mapping("test", {"kind": "ray", "ray": {"address": address}, **values})


@contextmanager
def running_head(folder: Path, **variables: str) -> Iterator[Head]:
    """The head while the context is open; its token is in this process's environment meanwhile.

    Args:
        variables: set where `ray start` runs.
    """
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    scratch = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # its sockets need a short path
    words = ["start", "--head", f"--node-ip-address={LOOPBACK}", f"--dashboard-host={LOOPBACK}"]
    words += [f"--{name}={port}" for name, port in ports.items()]
    words += ["--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats", "--block"]
    log = folder / "head.log"
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    environment |= {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", **variables}
    environment.pop("RAY_ADDRESS", None)
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *words, f"--temp-dir={scratch}"],
            env=environment,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    profile = profile_at(f"http://{LOOPBACK}:{ports['dashboard-port']}")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_AUTH_TOKEN", TOKEN)
            _await_dashboard(profile, process, log)
            yield Head(profile, scratch, process, f"{LOOPBACK}:{ports['port']}")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(scratch, ignore_errors=True)


def _await_dashboard(profile: Profile, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until the head takes questions about jobs."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        assert process.poll() is None, log.read_text()
        try:
            ray_jobs.state(profile, "nobody")
            return
        except SchedulerError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
