"""Several hosts on this machine: network namespaces that meet in a bridge of their own.

Host K has the address 10.77.0.K. A host can be cut off, and all its processes killed, as can a real
one. They share this machine's files and clock. Needs root, `ip` (iproute2), and leave to make
namespaces.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil


def what_is_missing() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if os.geteuid() != 0:
        return "needs root"
    if not shutil.which("ip"):
        return "needs ip (iproute2)"
    name = f"probe-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"needs network namespaces: {tried.stderr.strip()}" if tried.returncode else ""


@contextmanager
def several_hosts(number: int) -> Iterator[list[Host]]:
    """So many hosts; all that runs on them ends with the context."""
    prefix = f"h{os.getpid()}"
    switch = f"{prefix}-switch"
    hosts = [Host(prefix, switch, place) for place in range(1, number + 1)]
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for host in hosts:
            host.connect()
        yield hosts
    finally:
        for host in hosts:
            host.kill()
        for name in (*(host.name for host in hosts), switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


class Host:
    """One of them."""

    def __init__(self, prefix: str, switch: str, place: int) -> None:
        self.name, self.address = f"{prefix}-{place}", f"10.77.0.{place}"
        self._switch, self._port = switch, f"port{place}"
        self._started: list[subprocess.Popen[str]] = []

    def connect(self) -> None:
        """Make the host, and its cable to the switch."""
        _ip("netns", "add", self.name)
        _ip("-n", self.name, "link", "set", "lo", "up")
        cable = ("link", "add", "eth0", "netns", self.name, "type", "veth")
        _ip(*cable, "peer", "name", self._port, "netns", self._switch)
        _ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", self.name, "link", "set", "eth0", "up")
        _ip("-n", self._switch, "link", "set", self._port, "master", "bridge")
        self.heal()

    def cut_off(self) -> None:
        """Pull the plug: its processes live on and reach nobody."""
        _ip("-n", self._switch, "link", "set", self._port, "down")

    def heal(self) -> None:
        _ip("-n", self._switch, "link", "set", self._port, "up")

    def start(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Path,
        directory: Path | None = None,
    ) -> subprocess.Popen[str]:
        """Start a process on this host."""
        with log.open("a") as stream:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                env={**os.environ, **environment},
                cwd=directory,
                stdout=stream,
                stderr=stream,
                text=True,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def processes(self) -> list[psutil.Process]:
        told = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        return [
            psutil.Process(int(pid)) for pid in told.stdout.split() if psutil.pid_exists(int(pid))
        ]

    def kill(self) -> None:
        """SIGKILL to all that runs here, as when the power fails."""
        while alive := [one for one in self.processes() if one.status() != psutil.STATUS_ZOMBIE]:
            for process in alive:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(alive, timeout=1)
        for process in self._started:
            process.wait()


def _ip(*words: str) -> None:
    answer = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert answer.returncode == 0, f"ip {' '.join(words)}: {answer.stderr}"
