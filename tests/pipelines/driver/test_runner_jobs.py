"""A run whose stage is left to a job of its own: it waits, takes the result, or fails with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal
from unittest.mock import Mock, create_autospec

import pytest

from pipelines.driver.progress import Progress
from pipelines.driver.runner import Runner
from pipelines.errors import RetryableError, StageFailed
from pipelines.jobs import stage_jobs as module
from pipelines.jobs.stage_job import Standing
from pipelines.jobs.stage_jobs import StageJobs
from pipelines.jobs.submitted import Jobs
from pipelines.planning import PlannedStage, plan
from pipelines.recipe import Recipe, Resources
from pipelines.store.ledger import Ledger
from pipelines.tracking.tracker import Tracker
from tests.pipelines.fake_stages import FakeStage, attempts, finish
from tests.pipelines.jobs.test_stage_jobs import FakeCluster

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(120)]

OWN = Resources(job="own", attempts=1)
STAGES = FakeStage(name="heavy"), FakeStage(name="after", needs=("heavy",))


class WorkingCluster(FakeCluster):
    """One whose job does the stage while it is looked at."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__()
        self._work = work
        self.num_looks_after_the_end = 0

    def look(self, job_id: str) -> Standing | None:
        found = super().look(job_id)
        if found is not None and found.status == "RUNNING":
            self.num_looks_after_the_end += 1
            self.jobs[job_id] = Standing(status="SUCCEEDED", exit_code=0)
        if found is not None and found.status == "PENDING":
            self._work()
            self.jobs[job_id] = Standing(status="RUNNING", run_id=found.run_id)
        return found


class Run:
    """A run of these stages, the first of which is left to a job."""

    def __init__(
        self,
        recipe: Recipe,
        ledger: Ledger,
        cluster: FakeCluster,
        *,
        busy: Literal["wait", "leave"] = "wait",
        retry: frozenset[str] = frozenset(),
    ) -> None:
        recipe = recipe.model_copy(update={"resources": {"heavy": OWN}})
        self.planned = plan(recipe, ledger)
        self.tracker = create_autospec(Tracker, instance=True)
        self.runner = Runner(
            recipe,
            ledger,
            self.planned,
            run_id="run-1",
            tracker=self.tracker,
            progress=create_autospec(Progress),
            busy=busy,
            retry={"heavy": retry} if retry else {},
            stage_jobs=StageJobs(
                recipe,
                ledger,
                run_id="run-1",
                say=Mock(),
                connect=lambda: cluster,
                is_driven=lambda run_id: True,
            ),
        )

    @property
    def ends(self) -> dict[str, str]:
        return {name: state.state for name, state in self.runner.states.items()}


@pytest.fixture
def first(
    demo_recipe: Recipe,
    ledger: Ledger,
    use_stages: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> PlannedStage:
    """The stage that is left to a job, on what passes for others' cluster."""
    monkeypatch.setattr(module, "is_joined", lambda: True)
    use_stages(*STAGES)
    return plan(demo_recipe, ledger)[0]


def test_what_the_job_makes_is_taken(
    demo_recipe: Recipe, ledger: Ledger, first: PlannedStage
) -> None:
    """The stage is recorded as found; no unit of it was done here, and its lease is free."""
    cluster = WorkingCluster(lambda: finish(first, {"a": {"a.txt": "the job's"}}))
    run = Run(demo_recipe, ledger, cluster)
    run.runner.run()
    assert run.ends == {"heavy": "cached", "after": "ran"}
    assert attempts(first.record, "a") == []
    assert cluster.num_looks_after_the_end > 0
    assert run.tracker.stage_cached.call_args.args[0].name == "heavy"
    assert len(cluster.requests) == 1
    assert [job.state for job in Jobs(ledger).all()] == ["finished"]
    assert '"released": true' in Path(first.record.directory, "lease/00000001.json").read_text()


@pytest.mark.parametrize(
    ("code", "kind"), [(1, StageFailed), (3, RetryableError), (-9, RetryableError)]
)
def test_a_job_that_fails_fails_the_stage(
    demo_recipe: Recipe, ledger: Ledger, first: PlannedStage, code: int, kind: type[Exception]
) -> None:
    """The run's own exit code says whether the same command may do later."""
    cluster = FakeCluster()
    cluster.submit = lambda request: bool(  # type: ignore[method-assign]
        cluster.jobs.update({request.job_id: Standing(status="FAILED", exit_code=code)}) or True
    )
    run = Run(demo_recipe, ledger, cluster)
    with pytest.raises(kind, match=rf"stage heavy: job ediffi-heavy-.* exit code {code}"):
        run.runner.run()
    assert run.ends == {"heavy": "failed", "after": "blocked"}


def test_a_run_may_leave_another_runs_job(
    demo_recipe: Recipe, ledger: Ledger, first: PlannedStage
) -> None:
    """As with any stage that another run works on."""
    cluster = FakeCluster()
    stem = module.stem_of(first, ledger)
    cluster.jobs[f"{stem}-1"] = Standing(status="RUNNING", run_id="run-0")
    run = Run(demo_recipe, ledger, cluster, busy="leave")
    with pytest.raises(RetryableError, match=f"stage heavy: job {stem}-1 of run run-0 works on it"):
        run.runner.run()


def test_units_that_are_asked_for_again_are_done_by_the_run(
    demo_recipe: Recipe, ledger: Ledger, first: PlannedStage
) -> None:
    """`ediffi cache retry` names units; a job is a plain run, which does not know of them."""
    finish(first, {"a": {"a.txt": "old"}})
    cluster = FakeCluster()
    run = Run(demo_recipe, ledger, cluster, retry=frozenset({"a"}))
    run.runner.run()
    assert run.ends["heavy"] == "ran"
    assert cluster.requests == []
