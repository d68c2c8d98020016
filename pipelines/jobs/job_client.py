"""Jobs of the cluster that this run has joined, through Ray's own client."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private.services import get_webui_url_from_internal_kv
from ray.job_submission import JobSubmissionClient

from pipelines.errors import UserError
from pipelines.jobs import job_variables
from pipelines.jobs.stage_job import Request, Standing, Unreachable

TIMEOUT_S = 30.0  # of one request
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"  # Ray's own: where jobs are submitted


class _PatientClient(JobSubmissionClient):
    """Ray's client, which of itself waits for an answer for ever."""

    def _do_request(self, *words: Any, **options: Any) -> Any:
        options.setdefault("timeout", TIMEOUT_S)
        return super()._do_request(*words, **options)


class RayJobClient:
    """See `pipelines.jobs.stage_job.JobClient`."""

    def __init__(self) -> None:
        with _errors_in_words("this cluster"):
            self._client = _PatientClient()

    @property
    def address(self) -> str:
        return str(self._client.get_address())

    def look(self, job_id: str) -> Standing | None:
        try:
            with _errors_in_words(self.address):
                found = self._client.get_job_info(job_id)
        except _NoSuchJob:
            return None
        return Standing(
            status=found.status.value,
            exit_code=found.driver_exit_code,
            message=found.message or "",
            run_id=(found.metadata or {}).get("ediffi_run", ""),
        )

    def submit(self, request: Request) -> bool:
        """Beside what the request says, the job has what this driver's own job was given."""
        tables = ray.get_runtime_context().gcs_address
        inherited: dict[str, Any] = dict(ray.get_runtime_context().runtime_env)
        variables = {**inherited.pop("env_vars", {}), **request.variables}
        key = ""
        with _errors_in_words(self.address):
            try:
                if request.private:
                    key = job_variables.put(request.private, tables)
                    variables[job_variables.KEY_VARIABLE] = key
                self._client.submit_job(
                    submission_id=request.job_id,
                    entrypoint=_line(request.command),
                    runtime_env={**inherited, "env_vars": variables},
                    metadata={"ediffi_job": request.job_id, "ediffi_run": request.run_id},
                )
            except BaseException as error:
                if key:
                    job_variables.remove(key, tables)
                if "already exists" in str(error):
                    return False
                raise
        return True

    def stop(self, job_id: str) -> None:
        with _errors_in_words(self.address):
            self._client.stop_job(job_id)


def client_of_this_cluster() -> RayJobClient | None:
    """None where the cluster takes no jobs: its head was started without a dashboard."""
    # as Ray itself finds it; a second `ray.init` would tell it too, but takes SIGTERM for Ray
    if not os.environ.get(ADDRESS_VARIABLE) and not get_webui_url_from_internal_kv():
        return None
    return RayJobClient()


class _NoSuchJob(Unreachable):
    """The cluster answers, but does not know the job."""


@contextmanager
def _errors_in_words(address: str) -> Iterator[None]:
    """Ray's errors, which are bare RuntimeErrors, as ours."""
    try:
        yield
    except ray.exceptions.AuthenticationError as error:
        raise UserError(
            f"{address} takes no jobs from here: RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH must hold "
            "the token that the cluster was started with, and RAY_AUTH_MODE be `token`"
        ) from error
    except (OSError, ray.exceptions.RayError) as error:  # `requests` raises OSErrors
        raise Unreachable(
            f"Ray's dashboard at {address}, which takes jobs, does not answer ({_short(error)}); "
            "if it can only be reached from the head's own machine, start the head with "
            f"--dashboard-host=0.0.0.0, or name another way to it in {ADDRESS_VARIABLE}"
        ) from error
    except RuntimeError as error:
        if "status code 404" in str(error):
            raise _NoSuchJob(f"{address} does not know of it: {_short(error)}") from error
        if "status code 4" in str(error):
            raise UserError(f"{address} refuses the job: {_short(error)}") from error
        raise Unreachable(f"{address} could not do it: {_short(error)}") from error


def _short(error: Exception) -> str:
    """The last line of what may be a traceback of the server."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" .")]
    return lines[-1] if lines else type(error).__name__


def _line(command: tuple[str, ...]) -> str:
    """The command for a shell; code that was not installed is found where this process found it."""
    line = f"exec {shlex.join(command)}"  # a shell that stayed would hear of the job's end first
    root = Path(__file__).resolve().parents[2]
    if root.name in ("site-packages", "dist-packages"):
        return line
    return f"PYTHONPATH={shlex.quote(str(root))}${{PYTHONPATH:+:$PYTHONPATH}} {line}"
