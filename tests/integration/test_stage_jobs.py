"""Stages that Ray Jobs of their own drive, on a real head that asks for a token."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipelines.jobs.submitted import Jobs
from pipelines.store.ledger import Ledger
from tests.cluster.ray_head import TOKEN, Head, running_head
from tests.infra.watched_project import WatchedProject, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SECRET = "a-password-that-no-page-shows"


@dataclass
class Driver:
    """A run in the project's directory, with what it says."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text()

    def says(self, words: str) -> None:
        """Wait until it does."""
        wait_until(words, lambda: words in self.said, self.log)

    def end(self, *, by: signal.Signals | None = None) -> int:
        """Its exit code."""
        if by is not None:
            self.process.send_signal(by)
        return self.process.wait(200)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head on loopback."""
    with running_head(tmp_path_factory.mktemp("ray")) as head:
        yield head


@pytest.fixture
def project(tmp_path: Path) -> WatchedProject:
    """One stage, whose units wait for a word."""
    return WatchedProject.make(tmp_path / "project")


@pytest.fixture
def tracking_uri(tmp_path: Path) -> str:
    """A place that only the drivers have heard of, with its tables made.

    MLflow makes them in many steps; a driver that is killed in their midst leaves it useless.
    """
    uri = f"sqlite:///{tmp_path}/tracking.db"
    MlflowClient(uri).search_experiments()
    return uri


@pytest.fixture
def start(head: Head, project: WatchedProject, tracking_uri: str) -> Iterator[Callable[[], Driver]]:
    """Call it for a run whose stage is left to a job; what still runs after the test is killed."""
    environment = {**os.environ, **project.environment, "RAY_ADDRESS": head.address}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    environment |= {"MLFLOW_TRACKING_URI": tracking_uri, "MLFLOW_TRACKING_TOKEN": SECRET}
    drivers: list[Driver] = []

    def begin() -> Driver:
        log = project.path.parent / f"driver-{len(drivers)}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [*project.command, "--set", "resources.watched.job=own"],
                cwd=project.path,
                env=environment,
                stdout=stream,
                stderr=stream,
            )
        drivers.append(Driver(process, log))
        return drivers[-1]

    yield begin
    for driver in drivers:
        if driver.process.poll() is None:
            driver.end(by=signal.SIGKILL)


def let_all_go(project: WatchedProject) -> None:
    for unit in "abcd":
        project.let_go(unit)


def jobs(project: WatchedProject) -> list[str]:
    return sorted(job.job_id for job in Jobs(Ledger.at(project.path / "store")).all())


def tracked(tracking_uri: str) -> list[Any]:
    client = MlflowClient(tracking_uri)
    return client.search_runs([one.experiment_id for one in client.search_experiments()])


def test_a_job_outlives_its_driver_and_the_next_one_waits_for_it(
    head: Head, project: WatchedProject, start: Callable[[], Driver], tracking_uri: str
) -> None:
    """Nothing is begun twice, MLflow has no orphan, and nobody is told the drivers' secrets."""
    first = start()
    wait_until("begun", lambda: project.begun("a"), first.log)
    first.end(by=signal.SIGKILL)
    (job,) = jobs(project)
    second = start()
    second.says(f"watched: job {job} works on it already, submitted by run ")
    let_all_go(project)
    assert second.end() == 0, second.said
    assert jobs(project) == [job]
    assert [len(project.begun(unit)) for unit in "abcd"] == [1, 1, 1, 1]
    assert "watched            cached" in second.said

    records = Ledger.at(project.path / "store").runs()
    (of_job,) = (record for record in records if record["job"] == job)
    (made,) = project.path.glob("store/watched/*/made.json")
    assert json.loads(made.read_text())["run_id"] == of_job["run_id"]
    assert [record["state"] for record in records] == ["finished", "finished", "killed"]

    runs = tracked(tracking_uri)
    assert {run.info.status for run in runs} == {"FINISHED", "KILLED"}
    parents = {run.data.tags.get("ediffi.parent_run_id") for run in runs} - {None}
    assert parents == {records[-1]["run_id"]}
    files = [*head.logs.rglob("*"), *project.path.rglob("*")]
    assert not [path for path in files if path.is_file() and SECRET in _text(path)]


def test_a_driver_that_is_told_to_end_takes_its_job_along(
    project: WatchedProject, start: Callable[[], Driver], tracking_uri: str
) -> None:
    """Its units save; the same command submits the next job, which goes on from there."""
    first = start()
    wait_until("begun", lambda: project.begun("a") and project.begun("b"), first.log)
    assert first.end(by=signal.SIGTERM) == 3, first.said
    (job,) = jobs(project)
    assert f"watched: job {job} has ended" in first.said
    saved = {path.stem for path in (project.path / "control").glob("*.steps")}
    assert saved == {"a", "b"}
    let_all_go(project)
    second = start()
    assert second.end() == 0, second.said
    assert jobs(project) == [job, job.removesuffix("-1") + "-2"]
    assert [project.begun(unit)[-1]["begun"] > 0 for unit in "abcd"] == [True, True, False, False]
    assert "RUNNING" not in {run.info.status for run in tracked(tracking_uri)}


def _text(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")
