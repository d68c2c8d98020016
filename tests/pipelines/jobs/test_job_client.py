"""Ray's Jobs API as stages' jobs need it: its answers, and its errors in words."""

import os
from typing import Any

import pytest
import ray
from ray.experimental.internal_kv import _initialize_internal_kv

from pipelines.errors import RetryableError, UserError
from pipelines.jobs import job_client as module
from pipelines.jobs import job_variables
from pipelines.jobs.job_client import RayJobClient, client_of_this_cluster
from pipelines.jobs.stage_job import Request, Unreachable


class FakeClient:
    """Ray's client; each request ends with the error that a test wants."""

    error: Exception

    def get_address(self) -> str:
        return "http://10.0.0.5:8265"

    def get_job_info(self, job_id: str) -> None:
        raise self.error

    def stop_job(self, job_id: str) -> None:
        raise self.error

    def submit_job(self, **request: Any) -> None:
        raise self.error


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> RayJobClient:
    """Ours, with Ray's replaced."""
    monkeypatch.setattr(module, "_PatientClient", FakeClient)
    return RayJobClient()


TAKEN = "status code 500: Traceback\nValueError: Job with submission_id x already exists. Please"


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ray.exceptions.AuthenticationError("401"), UserError, "takes no jobs from here: RAY_AUTH"),
        (ConnectionError("refused"), Unreachable, r"not answer \(refused\).*--dashboard-host"),
        (
            RuntimeError("status code 500: Trace\nno agent"),
            Unreachable,
            "could not do it: no agent",
        ),
        (RuntimeError("status code 400: bad field"), UserError, "refuses the job: .*bad field"),
    ],
)
def test_errors_say_what_to_do(
    client: RayJobClient, error: Exception, kind: type[Exception], words: str
) -> None:
    """What may pass is told from what will not; each names the address."""
    FakeClient.error = error
    with pytest.raises(kind, match=rf"http://10\.0\.0\.5:8265.*{words}"):
        client.stop("ediffi-x-1")


def test_a_job_that_is_not_known_is_no_error(client: RayJobClient) -> None:
    """So that its number can be taken."""
    FakeClient.error = RuntimeError("status code 404: Job x does not exist")
    assert client.look("ediffi-x-1") is None


@pytest.mark.usefixtures("ray_cluster")
def test_an_id_that_is_taken_leaves_nothing_behind(
    client: RayJobClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variables that were to go along are taken back."""
    kept: list[tuple[str, str]] = []

    def put(variables: Any, address: str) -> str:
        kept.append(("a-key", address))
        return "a-key"

    monkeypatch.setattr(job_variables, "put", put)
    monkeypatch.setattr(job_variables, "remove", lambda *words: kept.remove(words))
    FakeClient.error = RuntimeError(TAKEN)
    request = Request(job_id="x", run_id="r", command=("x",), variables={}, private={"A": "b"})
    assert not client.submit(request)
    assert kept == []
    assert "b" not in repr(request).split("variables")[1]


@pytest.mark.usefixtures("ray_cluster")
def test_variables_are_taken_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the process that has the key; a second one is told that they are gone."""
    address = ray.get_runtime_context().gcs_address
    key = job_variables.put({"OUR_PASSWORD": "hidden-value"}, address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("OUR_PASSWORD", "another")
    monkeypatch.setenv(job_variables.KEY_VARIABLE, key)
    job_variables.take()
    assert os.environ["OUR_PASSWORD"] == "hidden-value"
    assert job_variables.KEY_VARIABLE not in os.environ
    job_variables.take()  # there is no key: nothing to do
    monkeypatch.setenv(job_variables.KEY_VARIABLE, key)
    with pytest.raises(RetryableError, match=f"not with the cluster's head at {address} any more"):
        job_variables.take()


@pytest.mark.usefixtures("ray_cluster")
def test_a_head_without_a_dashboard_takes_no_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a Slurm job of ours; Ray would look for it for most of a minute."""
    monkeypatch.delenv(module.ADDRESS_VARIABLE, raising=False)
    # Any other cluster that was shut down in this process has taken Ray's way to its tables along.
    _initialize_internal_kv(ray._private.worker.global_worker.gcs_client)
    assert client_of_this_cluster() is None
