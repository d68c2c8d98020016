"""Who hears what and when, and how a job ends, in a real Slurm; Ray is a stand-in that listens.

It needs seconds where Ray needs many; `test_slurm.py` has the whole with Ray and a run of ours.
"""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import slurm
from cluster.slurm import SlurmError, SlurmJob
from tests.infra.slurm import EmulatedSlurm, emulated_slurm, what_is_missing
from tests.infra.watched_project import wait_until

MISSING = what_is_missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]

SAVE_S = 20

# Started as the job's interpreter: `python -` waits until the head is there, and the file `hold` is
# not; anything else is `ray start`, which fails once where there is a file `lose`.
STAND_IN = """#!{python} -S
import os, signal, socket, sys, time
if sys.argv[1] == "-":
    host, port = os.environ["RAY_ADDRESS"].split(":")
    with socket.socket() as head:
        while os.path.exists("hold") or head.connect_ex((host, int(port))):
            time.sleep(0.1)
    sys.exit(int(os.environ["MISSING_NODES"]))
signal.signal(signal.SIGTERM, lambda *_: (print("Ray ends", time.time()), sys.exit(0)))
print("Ray starts", *sys.argv[3:], flush=True)
for word in sys.argv:
    if word.startswith("--port="):
        head = socket.create_server(("", int(word[7:])))
while not os.path.exists("lose"):
    time.sleep(0.1)
os.remove("lose")
sys.exit(1)
"""

# Tells what it hears; saves for a second; then ends as the first line of the file `code` says.
COMMAND = """
trap 'echo "command: TERM"; sleep 1; date +"command: saved %s.%N"; exit 3' TERM
echo "command: begins, $RAY_AUTH_MODE ${#RAY_AUTH_TOKEN}"
until [[ -e code ]]; do sleep 0.1; done
exit "$(head -n 1 code)"
"""

MakeJob = Callable[..., SlurmJob]


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmulatedSlurm]:
    """Four nodes, of which a job takes one unless the test says otherwise."""
    with emulated_slurm(4) as cluster:
        yield cluster


@pytest.fixture
def make_job(tmp_path: Path) -> MakeJob:
    """A job in a directory of its own."""
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)

    def make(**values: Any) -> SlurmJob:
        place = {
            "name": "job",
            "command": ("bash", "-c", COMMAND),
            "log_dir": str(tmp_path / "logs"),
            "directory": str(tmp_path),
            "python": str(stand_in),
            "environment": {"MISSING_NODES": "0"},
            "save_s": SAVE_S,
            "watch_s": 1,
        }
        return SlurmJob(**{**place, **values})

    return make


class Submitted:
    """A job under way."""

    def __init__(self, job: SlurmJob) -> None:
        self.directory = Path(job.directory)
        self.id = slurm.submit(job)
        self.log = slurm.log_path(job, self.id)

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def said_by_ray(self, node: int = 0) -> str:
        return self.log.with_name(f"{self.log.stem}.ray-{node}.log").read_text()

    def until_it_says(self, words: str, times: int = 1) -> None:
        wait_until(words, lambda: self.said.count(words) >= times, self.log)

    def until(self, name: str) -> slurm.State:
        wait_until(name, lambda: slurm.state(self.id).name == name, self.log)
        return slurm.state(self.id)

    def let_end(self, code: int) -> None:
        (self.directory / "code").write_text(f"{code}\n")


@pytest.mark.parametrize(("code", "name"), [(0, "finished"), (1, "failed"), (2, "failed")])
def test_code_of_the_command_is_the_jobs(
    cluster: EmulatedSlurm, make_job: MakeJob, code: int, name: str
) -> None:
    """A command that ends by itself ends the job, which is not queued again; Ray ends with it."""
    job = Submitted(make_job())
    job.until_it_says("command: begins, token 64")
    job.let_end(code)
    state = job.until(name)
    assert (state.exit_code, state.num_requeues) == (code, 0)
    assert "Ray ends" in job.said_by_ray()
    assert cluster.processes() == []
    assert not list(Path("/tmp").glob(f"ediffi-{job.id}.*"))


def test_nearly_out_of_time(cluster: EmulatedSlurm, make_job: MakeJob) -> None:
    """The command is told, saves, and the job is queued again; its second run may end it."""
    job = Submitted(make_job())
    job.until_it_says("command: begins")
    cluster.signal_batch(job.id, signal.SIGUSR1)
    state = job.until("waiting")
    assert state.num_requeues == 1
    assert job.said.count("command: TERM") == job.said.count("command: saved") == 1
    job.let_end(0)
    cluster.hurry(job.id)
    assert job.until("finished").num_requeues == 1
    assert "run 1: the command ended with exit code 0" in job.said


def test_slurm_tells_in_time_by_itself(cluster: EmulatedSlurm, make_job: MakeJob) -> None:
    """The limit need not be imitated: the signal comes before it, and the job is queued again."""
    job = Submitted(make_job(time_limit_min=1, save_s=30))
    wait_until("its time is up", lambda: "told to end (time)" in job.said, job.log)
    assert job.until("waiting").num_requeues == 1
    assert job.said.count("command: TERM") == job.said.count("command: saved") == 1
    slurm.cancel(job.id)


def test_surroundings_failed(cluster: EmulatedSlurm, make_job: MakeJob) -> None:
    """A command that ends with 3 is tried again, up to the limit; its code is the job's then."""
    job = Submitted(make_job(max_requeues=1))
    job.until_it_says("command: begins")
    job.let_end(3)
    job.until("waiting")
    cluster.hurry(job.id)
    state = job.until("failed")
    assert (state.exit_code, state.num_requeues) == (3, 1)
    assert "was queued again 1 times, which is the limit" in job.said


@pytest.mark.parametrize("how", ["cancel", "scancel", "preempted"])
def test_told_to_end(cluster: EmulatedSlurm, make_job: MakeJob, how: str) -> None:
    """However it comes, the command hears it once; then it is as Slurm says."""
    job = Submitted(make_job())
    job.until_it_says("command: begins")
    if how == "cancel":
        slurm.cancel(job.id)
    elif how == "scancel":
        slurm.cancel(job.id, at_once=True)
    else:
        cluster.preempt(job.id)
    state = job.until("waiting" if how == "preempted" else "cancelled")
    job.until_it_says("the command ended with exit code 3")
    wait_until("nothing is left", lambda: cluster.processes() == [], job.log)
    assert job.said.count("command: TERM") == job.said.count("command: saved") == 1
    if how == "cancel":  # else this Slurm, which tracks by parents, tells Ray as well
        saved = float(job.said.split("command: saved ")[1].split()[0])
        assert float(job.said_by_ray().split("Ray ends ")[1].split()[0]) > saved
    assert state.num_requeues == (how == "preempted")
    if how == "preempted":
        slurm.cancel(job.id)


def test_deaf_command(cluster: EmulatedSlurm, make_job: MakeJob) -> None:
    """One that does not end is killed while there is time to queue the job again."""
    deaf = ("bash", "-c", "trap '' TERM; echo 'command: begins'; while :; do sleep 1; done")
    job = Submitted(make_job(command=deaf))
    job.until_it_says("command: begins")
    cluster.signal_batch(job.id, signal.SIGUSR1)
    job.until("waiting")
    assert "the command ended with exit code 137" in job.said
    slurm.cancel(job.id)


def test_cancelled_before_the_command(cluster: EmulatedSlurm, make_job: MakeJob) -> None:
    """A job that is cancelled while its nodes gather never starts the command."""
    job = make_job()
    hold = Path(job.directory) / "hold"
    hold.touch()
    submitted = Submitted(job)
    submitted.until_it_says("starts Ray on")
    slurm.cancel(submitted.id)
    submitted.until("cancelled")
    assert "command: begins" not in submitted.said


def test_nodes_that_do_not_join(cluster: EmulatedSlurm, make_job: MakeJob) -> None:
    """Where nodes are missing the command does not start; the job is queued again, to the limit."""
    job = Submitted(make_job(environment={"MISSING_NODES": "1"}, max_requeues=0))
    assert job.until("failed").exit_code == 3
    assert "no Ray cluster; its nodes' words are in" in job.said
    assert "command: begins" not in job.said


def test_head_that_is_lost_under_the_command(cluster: EmulatedSlurm, make_job: MakeJob) -> None:
    """Ray's library ends a process whose head is gone, with code 1: no verdict on the run."""
    job = Submitted(make_job())
    lose = job.directory / "lose"
    lose.touch()  # a start that fails is tried again, and is forgotten
    job.until_it_says("command: begins")
    job.let_end(1)
    assert job.until("failed").num_requeues == 0

    (job.directory / "code").unlink()
    job = Submitted(make_job())
    job.until_it_says("command: begins")
    lose.touch()
    wait_until("the head is lost", lambda: not lose.exists(), job.log)
    job.let_end(1)
    assert job.until("waiting").num_requeues == 1
    assert "Ray's head had ended under it" in job.said
    slurm.cancel(job.id)


def test_nodes_of_one_job(cluster: EmulatedSlurm, make_job: MakeJob) -> None:
    """Each node starts Ray at its own address and in a folder of its own, and joins the first."""
    job = Submitted(make_job(num_nodes=3, node_group="gpu"))
    job.until_it_says("command: begins")
    for node in range(3):
        wait_until("Ray", lambda: "Ray starts" in job.said_by_ray(node), job.log)  # noqa: B023
    starts = [job.said_by_ray(node).split("Ray starts ")[1].split() for node in range(3)]
    options = [dict(word.partition("=")[::2] for word in words) for words in starts]
    assert ["--head" in one for one in options] == [True, False, False]
    addresses = {cluster.address_of(node) for node in cluster.hosts_of(job.id)}
    assert {one["--node-ip-address"] for one in options} == addresses
    assert len({one["--temp-dir"] for one in options}) == 3
    head = f"{options[0]['--node-ip-address']}:{options[0]['--port']}"
    assert [one.get("--address") for one in options] == [None, head, head]
    assert {one["--labels"] for one in options} == {"ray.io/node-group=gpu"}
    job.let_end(0)
    job.until("finished")
    assert all("Ray ends" in job.said_by_ray(node) for node in range(3))


def test_run_that_slurm_counts_on_no_longer(cluster: EmulatedSlurm, make_job: MakeJob) -> None:
    """The node is lost to Slurm but lives on: its run hears of its successor, saves and ends."""
    job = Submitted(make_job())
    job.until_it_says("command: begins")
    (lost,) = cluster.hosts_of(job.id)
    cluster.cut_off(lost)
    job.until_it_says("counts on this run no longer")
    job.until_it_says("run 0: the command ended with exit code 3")
    assert slurm.state(job.id).num_requeues == 1
    job.let_end(0)
    cluster.hurry(job.id)
    assert job.until("finished").num_requeues == 1
    assert cluster.hosts_of(job.id) != [lost]
    cluster.revive(lost)


def test_variables_that_are_passed_on(
    cluster: EmulatedSlurm, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are named reach the command, no others; what they hold stands nowhere."""
    code = 'echo "length ${#EDIFFI_TEST_SECRET}, other ${EDIFFI_TEST_OTHER:-none}"'
    job = make_job(command=("bash", "-c", code), pass_environment=("EDIFFI_TEST_SECRET",))
    with pytest.raises(SlurmError, match="EDIFFI_TEST_SECRET is not set in this shell"):
        slurm.submit(job)
    monkeypatch.setenv("EDIFFI_TEST_SECRET", "hidden-value")
    monkeypatch.setenv("EDIFFI_TEST_OTHER", "not-asked-for")
    submitted = Submitted(job)
    submitted.until("finished")
    assert "length 12, other none" in submitted.said
    script = subprocess.run(
        ["scontrol", "write", "batch_script", submitted.id, "-"], capture_output=True, text=True
    ).stdout
    assert "EDIFFI_TEST_SECRET" in script
    assert "hidden-value" not in script + submitted.said + str(cluster.job(submitted.id))


def test_waiting_job_is_cancelled(cluster: EmulatedSlurm, make_job: MakeJob) -> None:
    """A job that has not begun is taken off the queue at once."""
    job = Submitted(make_job(options={"begin": "now+1hour"}))
    assert slurm.state(job.id).name == "waiting"
    slurm.cancel(job.id)
    assert slurm.state(job.id).name == "cancelled"


def test_jobs_that_slurm_does_not_know(cluster: EmulatedSlurm, make_job: MakeJob) -> None:
    """A forgotten job is `unknown`; a request that Slurm refuses says why."""
    assert slurm.state("99999").name == "unknown"
    with pytest.raises(SlurmError, match="has a number, got 'latest'"):
        slurm.state("latest")
    with pytest.raises(SlurmError, match="invalid partition"):
        slurm.submit(make_job(partition="nowhere"))
