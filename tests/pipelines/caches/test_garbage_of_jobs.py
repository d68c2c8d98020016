"""Tests of pipelines.caches.garbage_of_jobs: what waits to run is needed, what ran is not."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pipelines.caches.garbage import find_garbage, find_kept, remove
from pipelines.errors import UserError
from pipelines.jobs.submitted import Job, Jobs, as_yaml
from pipelines.planning import plan
from pipelines.recipe import Recipe
from pipelines.store.ledger import Ledger
from tests.pipelines.fake_stages import FakeStage, finish, write_run

DAY = timedelta(days=1)


def ago(age: timedelta) -> str:
    return (datetime.now(UTC) - age).isoformat(timespec="milliseconds")


def keep(ledger: Ledger, job_id: str, recipe: str = "", **values: Any) -> Job:
    """A job of 90 days ago, but for what the test says."""
    place = {"profile": {"kind": "local"}, "kind": "local", "profile_name": "laptop"}
    named = {"recipe": "demo", "store": "s", "stages": (), "command": (), "environment": ""}
    fixed = {**place, **named, "submitted": ago(90 * DAY), "native_id": "7"}
    job = Job(job_id=job_id, **(fixed | values))
    assert Jobs(ledger).keep(job, recipe, "")
    return job


def text_of(recipe: Recipe) -> str:
    """A recipe as it lies beside a job's record."""
    return as_yaml(recipe.model_dump(mode="json", by_alias=True))


def going(ledger: Ledger) -> list[str]:
    """Names of what would be removed."""
    return [one.place.name for one in find_garbage(ledger, find_kept(ledger, [], DAY))]


def test_jobs_that_ended_long_ago_go(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> None:
    """But for the newest of a recipe, open and recent ones, and those of recent runs."""
    use_stages()
    text = text_of(demo_recipe)
    for number, values in enumerate(
        [
            {"state": "finished"},
            {"state": "unknown"},
            {"state": "waiting", "native_id": ""},  # cut off while it was sent
            {"state": "waiting"},
            {"state": "failed", "submitted": ago(DAY / 2)},
            {"state": "running"},
            {"state": "cancelled"},
            {"state": "running"},
            {"state": "finished"},
        ],
        start=1,
    ):
        keep(ledger, f"ediffi-demo-0123-{number}", text, **values)
    write_run(ledger, "a", started=ago(80 * DAY), job="ediffi-demo-0123-6")  # over, as its run says
    write_run(ledger, "b", started=ago(80 * DAY), ended=ago(DAY / 2), job="ediffi-demo-0123-7")
    keep(ledger, "ediffi-other-0123-1", state="finished")
    (ledger.store / "jobs" / "ediffi-cut-0123-1").mkdir()
    numbers = [f"ediffi-demo-0123-{number}" for number in (1, 2, 3, 6)]
    assert sorted(going(ledger)) == ["ediffi-cut-0123-1", *numbers]
    for one in find_garbage(ledger, find_kept(ledger, [], DAY)):
        assert remove(one) == ""
    assert going(ledger) == []
    assert len(Jobs(ledger).all()) == 6


@pytest.mark.parametrize("kind", ["directory", "bucket"])
def test_what_a_waiting_job_needs_stays(
    kind: str,
    ledger: Ledger,
    demo_recipe: Recipe,
    use_stages: Callable[..., None],
    request: pytest.FixtureRequest,
) -> None:
    """By its recipe, until its first run has noted what it comes to."""
    here = ledger if kind == "directory" else Ledger.open(request.getfixturevalue("s3_store"))
    use_stages(FakeStage(name="ingest"))
    (planned,) = plan(demo_recipe, here)
    finish(planned) if kind == "directory" else planned.record.open({}, {})
    assert going(here) == [planned.fingerprint]
    job = keep(here, "ediffi-demo-0123-1", text_of(demo_recipe))
    assert going(here) == []
    use_stages()
    assert going(here) == [planned.fingerprint]
    stages = [{"name": "ingest", "fingerprint": planned.fingerprint}]
    write_run(here, "a", state="stopped", started=ago(80 * DAY), stages=stages, job=job.job_id)
    assert going(here) == []


def test_a_job_whose_needs_cannot_be_told_stops_the_clearing(ledger: Ledger) -> None:
    """Its recipe does not fit here, or its record is another version's; what to do is told."""
    keep(ledger, "ediffi-demo-0123-1", "name: 3\n")
    with pytest.raises(
        UserError, match=r"(?s)job ediffi-demo-0123-1 was waiting .*`ediffi cancel`"
    ):
        going(ledger)
    (ledger.store / "jobs" / "ediffi-demo-0123-1" / "job.json").write_text("{}")
    with pytest.raises(UserError, match=r"job\.json: is no record of a job"):
        going(ledger)
