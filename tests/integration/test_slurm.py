"""Our script in a real Slurm of several emulated nodes: queued again, cancelled, nodes lost."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import slurm
from cluster.slurm import SlurmJob
from tests.infra.slurm import EmulatedSlurm, emulated_slurm, what_is_missing
from tests.infra.watched_project import DEADLINE_S, WatchedProject, wait_until

MISSING = what_is_missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmulatedSlurm]:
    """Four nodes of two CPUs, of which a job here takes two: some are left when one is lost."""
    with emulated_slurm(4) as cluster:
        yield cluster


@pytest.fixture
def project(tmp_path: Path) -> WatchedProject:
    return WatchedProject.make(tmp_path / "project")


@pytest.fixture
def job(project: WatchedProject) -> SlurmJob:
    """The project's run on two nodes, for four units at once."""
    return SlurmJob(
        name="watched",
        command=project.command,
        log_dir=str(project.path / "logs"),
        directory=str(project.path),
        num_nodes=2,
        cpus_per_node=2,
        python=sys.executable,
        environment=project.environment,
        object_store_gib=0.1,
        save_s=60,
        watch_s=2,
        start_s=DEADLINE_S,
    )


def test_requeued_preempted_cancelled_and_submitted_anew(
    cluster: EmulatedSlurm, project: WatchedProject, job: SlurmJob
) -> None:
    """Each end lets the units save, and each further run goes on from there; the last one ends."""
    job_id = slurm.submit(job)
    log = slurm.log_path(job, job_id)
    wait_until("four units began", lambda: all(map(project.begun, "abcd")), log)
    addresses = {cluster.address_of(node) for node in cluster.hosts_of(job_id)}
    assert {project.begun(unit)[0]["address"] for unit in "abcd"} == addresses
    assert slurm.state(job_id).name == "running"

    cluster.signal_batch(job_id, signal.SIGUSR1)  # as Slurm does when the time is nearly up
    wait_until("it asked to be queued again", lambda: state(job_id) == "waiting", log)
    assert slurm.state(job_id).num_requeues == 1
    cluster.hurry(job_id)
    wait_until("the second run", lambda: all(len(project.begun(one)) > 1 for one in "abcd"), log)
    assert {project.begun(unit)[1]["slurm_run"] for unit in "abcd"} == {"1"}
    saved = [project.begun(unit)[1]["begun"] for unit in "abcd"]
    assert min(saved) > 0

    cluster.preempt(job_id)
    wait_until("it was queued again", lambda: state(job_id) == "waiting", log)
    assert "told to end (slurm)" in log.read_text()
    cluster.hurry(job_id)
    wait_until("the third run", lambda: all(len(project.begun(one)) > 2 for one in "abcd"), log)
    # this Slurm, which tracks by parents, tells Ray as well: what was saved before is what counts
    assert all(project.begun(unit)[2]["begun"] >= steps for unit, steps in zip("abcd", saved))

    slurm.cancel(job_id)
    wait_until("it is cancelled", lambda: state(job_id) == "cancelled", log)
    assert leftovers(cluster, job_id) == []

    for unit in "abcd":
        project.let_go(unit)
    job_id = slurm.submit(job)
    log = slurm.log_path(job, job_id)
    wait_until("it is finished", lambda: state(job_id) == "finished", log)
    assert slurm.state(job_id).exit_code == 0
    assert project.is_finished
    assert all(project.begun(unit)[3]["begun"] > steps for unit, steps in zip("abcd", saved))
    assert leftovers(cluster, job_id) == []


def test_lost_node(cluster: EmulatedSlurm, project: WatchedProject, job: SlurmJob) -> None:
    """Slurm queues the job again on other nodes; units that were done are not done again."""
    job_id = slurm.submit(job)
    log = slurm.log_path(job, job_id)
    wait_until("four units began", lambda: all(map(project.begun, "abcd")), log)
    lost = cluster.hosts_of(job_id)[1]
    project.let_go("a")
    wait_until("a unit is done", lambda: project.receipt("a"), log)
    done = project.receipt("a")

    cluster.lose(lost)
    wait_until("Slurm misses it", lambda: slurm.state(job_id).num_requeues == 1, log)
    for unit in "bcd":
        for attempt in (1, 2):
            project.let_go(unit, attempt)
    cluster.hurry(job_id)
    wait_until("it is finished", lambda: state(job_id) == "finished", log)
    assert lost not in cluster.hosts_of(job_id)
    assert project.receipt("a") == done
    assert project.is_finished
    cluster.revive(lost)


def test_head_that_slurm_has_lost_lives_on(
    cluster: EmulatedSlurm, project: WatchedProject, job: SlurmJob
) -> None:
    """The script hears that the job was queued again without it, saves and ends; no unit is done
    by both runs."""
    job_id = slurm.submit(job)
    log = slurm.log_path(job, job_id)
    wait_until("four units began", lambda: all(map(project.begun, "abcd")), log)
    head = cluster.hosts_of(job_id)[0]
    cluster.cut_off(head)
    wait_until("Slurm misses it", lambda: slurm.state(job_id).num_requeues == 1, log)
    cluster.hurry(job_id)
    wait_until("the first run ended", lambda: "run 0: the command ended" in log.read_text(), log)
    assert "counts on this run no longer" in log.read_text()
    for unit in "abcd":
        project.let_go(unit)
    wait_until("it is finished", lambda: state(job_id) == "finished", log)
    assert head not in cluster.hosts_of(job_id)
    assert project.is_finished
    assert slurm.state(job_id).num_requeues == 1
    wait_until("nothing is left", lambda: leftovers(cluster, job_id) == [], log)
    cluster.revive(head)


def test_cluster_that_is_not_complete_starts_nothing(
    cluster: EmulatedSlurm, project: WatchedProject, job: SlurmJob
) -> None:
    """Where nodes do not join Ray in time, the command is not started on the others."""
    late = replace(job, start_s=1, max_requeues=0)
    job_id = slurm.submit(late)
    log = slurm.log_path(late, job_id)
    wait_until("it failed", lambda: state(job_id) == "failed", log)
    assert slurm.state(job_id).exit_code == 3
    assert "of 2 nodes joined Ray in time" in log.read_text()
    assert not project.begun("a")


def state(job_id: str) -> str:
    return slurm.state(job_id).name


def leftovers(cluster: EmulatedSlurm, job_id: str) -> list[str]:
    """Processes and folders of a job that is over."""
    running = [" ".join(one.cmdline()[:3]) for one in cluster.processes()]
    return running + [str(path) for path in Path("/tmp").glob(f"ediffi-{job_id}.*")]
