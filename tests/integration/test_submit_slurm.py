"""A recipe submitted to a real Slurm of one emulated node, through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

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
    """One node of two CPUs."""
    with emulated_slurm(1) as cluster:
        yield cluster


@pytest.fixture
def project(tmp_path: Path, cluster: EmulatedSlurm) -> WatchedProject:
    """The watched recipe, and the profile of the cluster beside it."""
    project = WatchedProject.make(tmp_path / "project")
    profile = {
        "kind": "slurm",
        "program": [sys.executable, "-m", "pipelines.cli"],
        "store": str(project.path / "store"),
        "shared_paths": [str(project.path)],
        "environment": project.environment,
        "node_groups": {"cpu": {"cpus_per_node": 2, "memory_per_node_gib": 6}},
        "stages": {"watched": "cpu"},
        "slurm": {
            "directory": str(project.path),
            "python": sys.executable,
            "save_s": 60,
            "setup": ['test -z "$NOBODY_HAS_SET_THIS" # as conda and module do'],
        },
    }
    (project.path / "cluster.yaml").write_text(yaml.safe_dump(profile))
    return project


def start(project: WatchedProject, *words: str) -> subprocess.Popen[str]:
    """Start `ediffi` as a user on the login node would."""
    environment = {**os.environ, **project.environment}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *words],
        cwd=project.path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ediffi(project: WatchedProject, *words: str) -> str:
    """What a command prints; it must succeed."""
    process = start(project, *words)
    output, narration = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, f"{words}: {narration}\n{output}"
    return output


def submit(project: WatchedProject) -> str:
    """Send the watched stage, with two units; returns the job's id."""
    config = "custom_stages.watched.config"
    sets = (f"{config}.control={project.path / 'control'}", f"{config}.units=[a, b]")
    words = ("submit", "recipe.yaml", "watched", "--cluster", "cluster.yaml")
    return ediffi(project, *words, *(f"--set={one}" for one in sets)).strip()


def state(project: WatchedProject, job_id: str) -> str:
    """As `status` tells it."""
    told = ediffi(project, "status", job_id, "--store", "store", "--json")
    return str(json.loads(told)["job"]["state"])


def test_a_job_is_followed_listed_cancelled_and_goes_on(
    cluster: EmulatedSlurm, project: WatchedProject
) -> None:
    """The second submission ends what the first one saved, in the packages of the lock."""
    job_id = submit(project)
    assert job_id.endswith("-1")
    assert submit(project) == job_id  # it is on its way: nothing was sent
    following = start(project, "logs", job_id, "--follow", "--store", "store")
    log = project.path / "ediffi-logs"
    try:
        wait_until("units began", lambda: project.begun("a"), *log.glob("*.log"))
        assert state(project, job_id) == "running"
        rows = ediffi(project, "list", "--store", "store", "--json").splitlines()
        told = {row["kind"]: row for row in map(json.loads, rows)}
        assert (told["job"]["id"], told["job"]["where"]) == (job_id, "cluster (slurm)")
        assert (told["run"]["state"], told["run"]["where"]) == ("running", job_id)

        ediffi(project, "cancel", job_id, "--store", "store")
        said, narration = following.communicate(timeout=DEADLINE_S)
        assert following.returncode == 0, narration
    finally:
        following.kill()
    assert "told to end (cancel)" in said
    wait_until("it is cancelled", lambda: state(project, job_id) == "cancelled")

    for unit in "ab":
        project.let_go(unit)
    again = submit(project)
    assert again == job_id.removesuffix("-1") + "-2"
    said = ediffi(project, "logs", again, "--follow", "--store", "store")
    record = json.loads(ediffi(project, "status", again, "--store", "store", "--json"))
    assert record["job"]["state"] == "finished", said
    assert "--expect-environment sha256:" in " ".join(record["job"]["command"])
    assert record["state"] == "finished"
    assert project.is_finished
    assert project.begun("a")[1]["begun"] > 0  # it went on from what the first had saved
