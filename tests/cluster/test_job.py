"""Job specifications: a command at a place."""

from typing import Any

import pytest

from cluster.job import JobSpec
from cluster.profile import Profile

LAPTOP = Profile(name="laptop", kind="local", environment={"A": "profile", "B": "profile"})


def test_a_job_adds_to_the_variables_of_its_place() -> None:
    """What the submission says stands before what the profile says; sorted, and frozen."""
    job = JobSpec(name="j", command=("true",), profile=LAPTOP, environment={"A": "job"})
    assert dict(job.variables) == {"A": "job", "B": "profile"}
    with pytest.raises(TypeError):
        job.variables["A"] = "3"  # type: ignore[index]


def test_a_job_is_a_frozen_copy() -> None:
    """The caller's dictionary cannot change the job afterwards."""
    environment = {"A": "1"}
    job = JobSpec(name="j", command=("true",), profile=LAPTOP, environment=environment)
    environment["A"] = "2"
    assert job.environment == {"A": "1"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"command": ()}, "command must be"),
        ({"command": "ediffi run"}, "split a shell line"),
        ({"command": ("ediffi", 3)}, "command must be text"),
        ({"command": ("ediffi\nrm",)}, "text on one line"),
        ({"name": "Train_Base"}, "job name must be"),
        ({"name": "a" * 48}, "at most 47.* of 48"),
        ({"name": "1st"}, "begin with a letter"),
        ({"environment": {"NCCL-DEBUG": "x"}}, "no name of an environment variable"),
        ({"environment": {"DEBUG": False}}, "environment.DEBUG must be text, got False"),
        ({"environment": {"HF_TOKEN": "x"}}, "environment.HF_TOKEN looks like a secret"),
        ({"environment": {"EDIFFI_WEBHOOK_URL": "x"}}, "EDIFFI_WEBHOOK_URL looks like a secret"),
        ({"environment": {"URI": "https://t0ken@host/x"}}, "URI looks like a secret"),
        ({"environment": {"URI": "postgresql://me:pw@host/db"}}, "URI looks like a secret"),
    ],
)
def test_job_that_no_scheduler_could_run_is_refused(values: dict[str, Any], words: str) -> None:
    """The error names the field, what it must be and what was found."""
    with pytest.raises(ValueError, match=words):
        JobSpec(**{"name": "job", "command": ("true",), "profile": LAPTOP, **values})


def test_settings_that_only_sound_secret_are_taken() -> None:
    """A word within a word is none."""
    harmless = {"TOKENIZERS_PARALLELISM": "false", "RAY_AUTH_TOKEN_PATH": "/run/token"}
    job = JobSpec(name="j", command=("x",), profile=LAPTOP, environment=harmless)
    assert harmless.items() <= job.environment.items()


def test_a_secret_that_is_refused_is_not_shown() -> None:
    """The message names the variable and not its value."""
    with pytest.raises(ValueError) as caught:
        JobSpec(name="j", command=("x",), profile=LAPTOP, environment={"MY_PASSWORD": "sesame"})
    assert "sesame" not in str(caught.value)
