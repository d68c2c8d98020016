"""What would be sent, for every kind of place, beside what was sent when somebody last looked.

`EDIFFI_REWRITE_GOLDEN=1 pytest tests/cluster/test_launch.py` writes the files anew; look at the
difference before you commit it.
"""

import os
from pathlib import Path

import pytest

from cluster.job import JobSpec
from cluster.launch import render
from cluster.profile import load_profile

PROFILES = Path(__file__).with_name("profiles")
GOLDEN = Path(__file__).with_name("golden")


def job_at(profile: str) -> JobSpec:
    """The same job at any place."""
    place = load_profile(str(PROFILES / f"{profile}.yaml"))
    recipe = "s3://bucket/store/jobs/ediffi-demo-01234567-1/recipe.yaml"
    return JobSpec(
        name="ediffi-demo-01234567-1",
        command=(*place.program, "run", recipe, "base", "--store", "s3://bucket/store"),
        profile=place,
        environment={"EDIFFI_JOB_ID": "ediffi-demo-01234567-1"},
    )


@pytest.mark.parametrize("profile", sorted(path.stem for path in PROFILES.glob("*.yaml")))
def test_a_job_is_rendered_as_before(profile: str) -> None:
    """Every byte that would be sent is in a file that people have read."""
    # what follows is the same for every Slurm job, and has a golden file of its own
    text = render(job_at(profile)).partition("# -- from here on")[0]
    path = GOLDEN / f"{profile}.txt"
    if os.environ.get("EDIFFI_REWRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()
    assert render(job_at(profile)) == render(job_at(profile))


def test_a_secret_of_this_machine_is_in_no_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that go along are rendered as references, whatever their values are."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "sesame")
    monkeypatch.setenv("CHAT_ADDRESS", "https://chat.example/sesame")
    for path in PROFILES.glob("*.yaml"):
        assert "sesame" not in render(job_at(path.stem))
