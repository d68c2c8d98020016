"""A real Slurm of several emulated nodes on this machine: munged, slurmctld, one slurmd a node.

Everything lies in one directory and listens on loopback; node `nodeK` is at 127.0.0.(10+K). Needs
root, and slurmctld, slurmd and munged: `apt-get install --no-install-recommends slurm-wlm munge`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.infra.ports import free_ports

START_DEADLINE_S = 60
# A node refuses a job, which then fails, in the second in which it ended the job's last run.
REVOCATION_S = 2
MUNGE_KEY_BYTES = 128
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
NODE_TIMEOUT_S = 30  # a node that is silent for so long is lost; a busy machine is not


def what_is_missing() -> str:
    """Why no Slurm can be emulated here; empty if it can."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    return f"needs {', '.join(absent)} (slurm-wlm, munge)" if absent else ""


@contextmanager
def emulated_slurm(num_nodes: int, *, cpus_per_node: int = 2) -> Iterator[EmulatedSlurm]:
    """A Slurm for as long as the context is open. Sets SLURM_CONF for this process meanwhile."""
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: sockets lie in it
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(directory / "slurm.conf")
    slurm = EmulatedSlurm(directory, num_nodes, cpus_per_node)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(directory, ignore_errors=True)


class EmulatedSlurm:
    """The daemons, and what may happen to them."""

    def __init__(self, directory: Path, num_nodes: int, cpus_per_node: int) -> None:
        self.directory = directory
        self.nodes = [f"node{number}" for number in range(1, num_nodes + 1)]
        self._cpus_per_node = cpus_per_node
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        for name in ("state", "spool", "log", "munge"):
            (self.directory / name).mkdir(mode=0o755)
        self.directory.chmod(0o755)
        self._start_munge()
        (self.directory / "slurm.conf").write_text(self._configuration())
        self._start("slurmctld", "slurmctld", "-D")
        for node in self.nodes:
            self.revive(node)
        self._wait("all nodes are idle", lambda: self.idle_nodes() == self.nodes)

    def stop(self) -> None:
        """End the daemons, then what their jobs may have left."""
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self.processes():
            process.kill()

    # -- nodes -------------------------------------------------------------------------------------

    def idle_nodes(self) -> list[str]:
        told = _run("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N", check=False)
        return sorted(set(told.split()))

    def cut_off(self, node: str) -> None:
        """SIGKILL to the node's daemon alone: Slurm misses the node, its processes live on."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def lose(self, node: str) -> None:
        """SIGKILL to all that runs on a node, as when its power fails."""
        self.cut_off(node)
        tasks = self.processes(node)
        parents = {one.parent() for one in tasks}
        steps = [one for one in parents if one is not None and "slurmstepd" in one.name()]
        for process in (*steps, *tasks):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def revive(self, node: str) -> None:
        """Start a node's daemon, at first or again."""
        self._start(node, "slurmd", "-D", "-N", node)

    def processes(self, node: str = "") -> list[psutil.Process]:
        """What jobs run on a node, or on any: known by the environment that Slurm gives them."""
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
            except psutil.Error:
                continue
            if environment.get("SLURM_CONF") != str(self.directory / "slurm.conf"):
                continue
            is_ours = "SLURM_JOB_ID" in environment
            if is_ours and (not node or environment.get("SLURMD_NODENAME") == node):
                found.append(process)
        return found

    # -- jobs --------------------------------------------------------------------------------------

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        told = _run("scontrol", "show", "job", "--oneliner", job_id)
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    def hosts_of(self, job_id: str) -> list[str]:
        """The nodes of a job, its head first."""
        return _run("scontrol", "show", "hostnames", self.job(job_id)["NodeList"]).split()

    def address_of(self, node: str) -> str:
        return f"127.0.0.{10 + self.nodes.index(node) + 1}"

    def hurry(self, job_id: str) -> None:
        """Start a job now that was queued again: Slurm would let it wait for two minutes."""
        self._wait("the job waits", lambda: self.job(job_id)["JobState"] == "PENDING")
        time.sleep(REVOCATION_S)
        _run("scontrol", "update", f"JobId={job_id}", "StartTime=now")

    def preempt(self, job_id: str) -> None:
        """Take a job's nodes away and queue it again, as for one of higher priority."""
        _run("scontrol", "requeue", job_id)

    def signal_batch(self, job_id: str, number: signal.Signals) -> None:
        """Send a signal to a job's script, as Slurm does when its time is nearly up."""
        _run("scancel", "--batch", f"--signal={number.name.removeprefix('SIG')}", job_id)

    # -- inside ------------------------------------------------------------------------------------

    def _start(self, name: str, *command: str) -> None:
        with (self.directory / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(command, stdout=log, stderr=log)

    def _start_munge(self) -> None:
        folder = self.directory / "munge"
        key, place = folder / "munge.key", folder / "socket"
        key.write_bytes(os.urandom(MUNGE_KEY_BYTES))
        key.chmod(0o400)
        files = {"key": key, "pid": folder / "pid", "log": folder / "log", "seed": folder / "seed"}
        options = [f"--{name}-file={path}" for name, path in files.items()]
        self._start("munged", "munged", "--foreground", "--force", f"--socket={place}", *options)
        self._wait("munged listens", place.exists)

    def _configuration(self) -> str:
        host, folder = socket.gethostname().split(".")[0], self.directory
        ports = free_ports(1 + len(self.nodes))
        settings = {
            "ClusterName": "emulated",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": ports[0],
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={folder}/munge/socket",
            "CredType": "cred/munge",
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": f"{folder}/spool/%n",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": f"{folder}/slurmd-%n.pid",
            "SlurmctldLogFile": folder / "log/slurmctld.log",
            "SlurmdLogFile": f"{folder}/log/%n.log",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SwitchType": "switch/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU_Memory",
            "AccountingStorageType": "accounting_storage/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=2,bf_interval=5",
            "SlurmdParameters": "config_overrides",
            "FirstJobId": random.randrange(1000, 1_000_000),  # two of these share /tmp and ports
            "ReturnToService": 2,  # a node that comes back is used again
            "SlurmdTimeout": NODE_TIMEOUT_S,
            "KillWait": 30,  # as it comes: so long may a job take to end
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        for number, (node, port) in enumerate(zip(self.nodes, ports[1:]), start=1):
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.{10 + number} Port={port} "
                f"CPUs={self._cpus_per_node} RealMemory=8000 State=UNKNOWN"
            )
        lines.append(f"PartitionName=main Nodes={','.join(self.nodes)} Default=YES State=UP")
        return "\n".join(lines) + "\n"

    def _wait(self, moment: str, has_come: object) -> None:
        assert callable(has_come)
        deadline = time.monotonic() + START_DEADLINE_S
        while not has_come():
            logs = (self.directory / "log").glob("*.out")
            said = "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in logs)
            assert time.monotonic() < deadline, f"{moment}: not in {START_DEADLINE_S} s\n{said}"
            time.sleep(0.1)


def _run(*command: str, check: bool = True) -> str:
    answer = subprocess.run(command, capture_output=True, text=True)
    assert not check or answer.returncode == 0, f"{command}: {answer.stderr}"
    return answer.stdout
