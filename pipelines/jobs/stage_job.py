"""The Ray Job that drives one stage, purely: its id, its command and the recipe that it reads.

The id is a function of stage, fingerprint and store but for the number at its end, so that any
driver finds the job of any other. The recipe lies where those of submitted jobs lie, and there is a
record beside it: `ediffi list`, `status`, `logs` and `cancel` know the job too.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pipelines.errors import RetryableError
from pipelines.jobs.submitted import JOB_VARIABLE, PARENT_VARIABLE, Job, as_yaml, travelling
from pipelines.masking import mask
from pipelines.planning import PlannedStage
from pipelines.recipe import CacheRecipe
from pipelines.recipe_sections.resources import Resources
from pipelines.store.ledger import Ledger

PLACE = "joined-cluster"  # what a record says instead of a profile's name
END_S = 60.0  # after its units have saved, a driver leaves Ray and MLflow within this time
NUM_LINES = 12  # of what a job said last
_PASSED = ("AWS_", "MLFLOW_")  # settings of store and tracker begin so
_TOLD_HERE = "EDIFFI_WEBHOOK_URL"  # the run that waits tells of the end; once is enough


class Unreachable(RetryableError):
    """The part of the cluster that knows its jobs does not answer, or not as it should."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is sent to the cluster.

    Attributes:
        run_id: of the run that asks for it.
        command: of the job's driver.
        variables: of driver and units; whoever may ask the cluster about the job can read them.
        private: of the driver alone, and read by nobody else.
    """

    job_id: str
    run_id: str
    command: tuple[str, ...]
    variables: Mapping[str, str]
    private: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What the cluster says of a job.

    Attributes:
        status: Ray's word: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        exit_code: of its driver; None while it runs, and where nobody knows.
        message: why it ended, with the last lines that its driver said.
        run_id: of the run that asked for it.
    """

    status: str
    exit_code: int | None = None
    message: str = ""
    run_id: str = ""

    @property
    def is_open(self) -> bool:
        return self.status in ("PENDING", "RUNNING")


class JobClient(Protocol):
    """A way to a cluster's jobs.

    Each call raises Unreachable while the cluster does not answer, UserError where it refuses.
    """

    @property
    def address(self) -> str:
        """Where jobs are submitted: http(s)://HOST:PORT."""

    def look(self, job_id: str) -> Standing | None:
        """How a job stands; None if the cluster does not know it."""

    def submit(self, request: Request) -> bool:
        """Send a job; False if the cluster has one of that id."""

    def stop(self, job_id: str) -> None:
        """Ask a job to save and end; does not wait for it."""


def stem_of(planned: PlannedStage, ledger: Ledger) -> str:
    """The beginning of the ids of a stage's jobs: equal stages of other stores are other work."""
    name = re.sub(r"[^a-z0-9]+", "-", planned.name)
    place = hashlib.sha256(str(ledger.store).encode()).hexdigest()[:6]
    return f"ediffi-{name}-{planned.fingerprint[:8]}-{place}"


def recipe_text(recipe: CacheRecipe) -> str:
    """The recipe as the job reads it: paths absolute, and no stage left to a further job."""
    document = travelling(recipe.model_dump(mode="json", by_alias=True), lambda path: True)
    for section in document["resources"].values():
        section["job"] = "run"
    return as_yaml(document)


def record_of(
    job_id: str, stage: str, recipe: CacheRecipe, ledger: Ledger, recipe_place: str, address: str
) -> Job:
    """What the store keeps of the job.

    Args:
        address: of the cluster's Jobs API.
    """
    store = str(ledger.store)
    program = (sys.executable, "-m", "pipelines.cli")
    return Job(
        job_id=job_id,
        recipe=recipe.name,
        profile={"kind": "ray", "ray": {"address": address}},
        profile_name=PLACE,
        kind="ray",
        store=store,
        stages=(stage,),
        command=(*program, "run", recipe_place, stage, "--store", store),
        environment="",  # that of the run which submits it, on the same cluster
        native_id=job_id,
    )


def variables_of(job_id: str, run_id: str, resources: Resources) -> dict[str, str]:
    """Variables that say which job it is, and how long it may take to end when it is stopped."""
    return {
        JOB_VARIABLE: job_id,
        PARENT_VARIABLE: run_id,
        "RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(resources.stop_deadline_s + END_S)),
        _TOLD_HERE: "",
    }


def private_variables(environment: Mapping[str, str], tracking_uri: str) -> dict[str, str]:
    """What this driver knows of store and tracker, secrets among it.

    Args:
        tracking_uri: where this run is tracked.
    """
    passed = {name: value for name, value in environment.items() if name.startswith(_PASSED)}
    # three slashes and a relative path: the job works in another directory
    uri = re.sub(r"^sqlite:///(?=[^/])", f"sqlite:///{Path.cwd()}/", tracking_uri)
    return passed | ({"MLFLOW_TRACKING_URI": uri} if uri else {})


# -- after its end --------------------------------------------------------------------------------


def how_it_ended(found: Standing | None) -> str:
    """Words for a job that is over; None: the cluster does not know it."""
    if found is None:
        return "is not known to the cluster any more"
    if found.exit_code is not None:
        return f"ended with exit code {found.exit_code}"
    return "was stopped" if found.status == "STOPPED" else "was lost"


def last_words(found: Standing | None) -> list[str]:
    """The last lines that a job said, without secrets."""
    if found is None:
        return []
    header, _, said = found.message.partition("last available logs")  # Ray's words
    lines = [line.rstrip() for line in (said.partition("\n")[2] or header).splitlines()]
    return [mask(line) for line in lines if line][-NUM_LINES:]
