"""Stages left to jobs: submitted once, found again, judged by their end, stopped with the run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from pipelines.driver.stage_state import StageState
from pipelines.errors import RetryableError, StageFailed, UserError
from pipelines.jobs import stage_jobs as module
from pipelines.jobs.stage_job import Request, Standing, Unreachable, stem_of
from pipelines.jobs.stage_jobs import StageJobs
from pipelines.jobs.submitted import Jobs
from pipelines.planning import plan
from pipelines.recipe import Recipe, Resources
from pipelines.store.ledger import Ledger
from tests.pipelines.fake_stages import FakeStage

RUNNING = Standing(status="RUNNING", run_id="run-0")
STOPPED = Standing(status="STOPPED")


@dataclass
class FakeCluster:
    """A cluster's jobs: what a test says they are.

    Attributes:
        jobs: how each stands; what is submitted is pending.
        late: ids that another driver submits just before us.
        is_silent: whether nothing can be heard of it.
    """

    jobs: dict[str, Standing] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    late: Mapping[str, Standing] = field(default_factory=dict)
    is_silent: bool = False
    address: str = "http://10.0.0.5:8265"

    def look(self, job_id: str) -> Standing | None:
        if self.is_silent:
            raise Unreachable("nobody answers")
        return self.jobs.get(job_id)

    def submit(self, request: Request) -> bool:
        self.jobs |= self.late
        if request.job_id in self.jobs:
            return False
        self.requests.append(request)
        self.jobs[request.job_id] = Standing(status="PENDING", run_id=request.run_id)
        return True

    def stop(self, job_id: str) -> None:
        self.stopped.append(job_id)


@dataclass
class Driver:
    """A run's side of the stage."""

    jobs: StageJobs
    state: StageState
    said: list[str]
    clock: list[float]

    def looks(self) -> bool:
        """One look after two seconds."""
        self.clock[0] += 2
        return self.jobs.is_at_work(self.state)

    def goes_on(self) -> None:
        """What a run does about the stage as long as it has no manifest."""
        if not self.looks():
            self.jobs.submit(self.state)

    def goes_on_and_on(self, meanwhile: Callable[[], None]) -> None:
        """The same for as long as any patience lasts."""
        for _ in range(100):
            self.goes_on()
            meanwhile()


@pytest.fixture
def cluster() -> FakeCluster:
    """One without any job."""
    return FakeCluster()


@pytest.fixture
def driver(
    demo_recipe: Recipe,
    ledger: Ledger,
    cluster: FakeCluster,
    use_stages: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Driver]:
    """Call it to begin a run on that cluster."""
    clock = [100.0]
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(module.time, "sleep", lambda s: clock.__setitem__(0, clock[0] + s))
    use_stages(FakeStage(name="heavy"))

    def begin(run_id: str = "run-1", alive: tuple[str, ...] = (), **options: Any) -> Driver:
        said: list[str] = []
        resources = Resources(job="own", **{"attempts": 3, "backoff_s": 0, **options})
        recipe = demo_recipe.model_copy(update={"resources": {"heavy": resources}})
        state = StageState(planned=plan(recipe, ledger)[0], resources=resources)
        jobs = StageJobs(
            recipe,
            ledger,
            run_id=run_id,
            say=said.append,
            connect=lambda: cluster,
            is_driven=lambda one: one in alive,
        )
        return Driver(jobs, state, said, clock)

    return begin


@pytest.fixture
def stem(driver: Callable[..., Driver], ledger: Ledger) -> str:
    """Of the ids of the stage's jobs."""
    return stem_of(driver().state.planned, ledger)


def test_a_stage_without_a_job_is_submitted_once(
    driver: Callable[..., Driver], cluster: FakeCluster, ledger: Ledger, stem: str
) -> None:
    """The store has what the job reads, and a record; then its end is waited for."""
    one = driver()
    assert one.jobs.is_wanted(one.state)
    one.goes_on()
    one.goes_on()
    (request,) = cluster.requests
    assert (request.job_id, request.run_id) == (f"{stem}-1", "run-1")
    (job,) = Jobs(ledger).all()
    assert (job.job_id, job.command, job.stages) == (f"{stem}-1", request.command, ("heavy",))
    assert (ledger.store / "jobs" / job.job_id / "recipe.yaml").exists()
    assert one.said == [
        f"heavy: submitted as job {stem}-1; see `ediffi logs {stem}-1 --store {ledger.store}`"
    ]


def test_the_next_driver_waits_for_what_runs(
    driver: Callable[..., Driver], cluster: FakeCluster, stem: str
) -> None:
    """It submits nothing and says so once."""
    driver(run_id="run-0").goes_on()
    one = driver()
    assert [one.looks() for _ in range(3)] == [True] * 3
    assert len(cluster.requests) == 1
    assert one.said == [
        f"heavy: job {stem}-1 works on it already, submitted by run run-0; waits for it"
    ]


def test_of_two_drivers_the_slower_attaches(
    driver: Callable[..., Driver], cluster: FakeCluster, stem: str
) -> None:
    """Also if both found no job."""
    one = driver()
    cluster.late = {f"{stem}-1": RUNNING}
    one.goes_on()
    assert one.looks()
    assert cluster.requests == []
    assert "works on it already, submitted by run run-0" in one.said[-1]


def test_a_submission_that_was_cut_off_is_made_again(
    driver: Callable[..., Driver], cluster: FakeCluster, stem: str
) -> None:
    """The record is there, but the cluster knows nothing of that number: it is free."""
    driver(run_id="run-0").goes_on()
    cluster.jobs.clear()
    driver().goes_on()
    assert [one.job_id for one in cluster.requests] == [f"{stem}-1"] * 2


def test_jobs_that_ended_in_earlier_runs_are_passed_over(
    driver: Callable[..., Driver], cluster: FakeCluster, stem: str
) -> None:
    """The next number is submitted, and costs no attempt of this run."""
    cluster.jobs = {f"{stem}-{number}": STOPPED for number in (1, 2)}
    one = driver(attempts=1)
    one.goes_on()
    assert [request.job_id for request in cluster.requests] == [f"{stem}-3"]


@pytest.mark.parametrize(
    ("end", "next_number", "words"),
    [
        (Standing(status="FAILED", exit_code=3), 2, "ended with exit code 3"),
        (Standing(status="FAILED", exit_code=-9), 2, "ended with exit code -9"),
        (Standing(status="FAILED", message="no node"), 2, "was lost"),
        (STOPPED, 2, "was stopped"),
        (None, 1, "is not known to the cluster any more"),
    ],
)
def test_another_job_follows_one_that_may_do_better(
    driver: Callable[..., Driver],
    cluster: FakeCluster,
    stem: str,
    end: Standing | None,
    next_number: int,
    words: str,
) -> None:
    """Its manifest is looked for once more before; after a pause the next one is submitted."""
    one = driver(backoff_s=10)
    one.goes_on()
    del cluster.jobs[f"{stem}-1"]
    if end is not None:
        cluster.jobs[f"{stem}-1"] = end
    assert one.looks()
    assert len(one.said) == 1
    assert [one.looks() for _ in range(4)] == [True] * 4
    assert f"job {stem}-1 {words}: attempt 1 of 3; another job is submitted in 1" in one.said[1]
    one.clock[0] += 20
    one.goes_on()
    assert [request.job_id for request in cluster.requests] == [
        f"{stem}-1",
        f"{stem}-{next_number}",
    ]


def test_attempts_come_to_an_end(
    driver: Callable[..., Driver], cluster: FakeCluster, ledger: Ledger, stem: str
) -> None:
    """The surroundings failed each time: the same command may do later."""
    one = driver(attempts=2)
    words = rf"stage heavy: job {stem}-2 ended with exit code 3"

    def fail() -> None:
        cluster.jobs = dict.fromkeys(cluster.jobs, Standing(status="FAILED", exit_code=3))

    with pytest.raises(RetryableError, match=words):
        one.goes_on_and_on(fail)
    assert len(cluster.requests) == 2
    assert [job.state for job in Jobs(ledger).all()] == ["failed", "failed"]


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (1, StageFailed, "ended with exit code 1\n  unit a: it is broken\n  all of it: `ediffi "),
        (2, UserError, "ended with exit code 2\n  unit a: it is broken"),
        (127, StageFailed, "ended with exit code 127"),
        (0, StageFailed, r"ended with exit code 0\n  but there is no manifest in .*/heavy/"),
    ],
)
def test_some_ends_are_for_good(
    driver: Callable[..., Driver],
    cluster: FakeCluster,
    stem: str,
    code: int,
    kind: type,
    words: str,
) -> None:
    """The stage fails with the job's last words, and where to read all of them."""
    one = driver()
    one.goes_on()
    message = "failed, last available logs (truncated):\nunit a: it is broken\n" if code else ""
    status = "FAILED" if code else "SUCCEEDED"
    cluster.jobs[f"{stem}-1"] = Standing(status=status, exit_code=code, message=message)
    assert one.looks()
    with pytest.raises(kind, match=rf"stage heavy: job {stem}-1 {words}"):
        one.looks()
    assert len(cluster.requests) == 1


def test_a_cluster_that_is_silent_is_asked_again(
    driver: Callable[..., Driver], cluster: FakeCluster
) -> None:
    """For two minutes: its jobs go on without the dashboard. Then the same command may do later."""
    one = driver()
    one.goes_on()
    cluster.is_silent = True
    assert [one.looks() for _ in range(50)] == [True] * 50
    cluster.is_silent = False
    assert one.looks()
    cluster.is_silent = True
    with pytest.raises(RetryableError, match=r"heavy: for 120 s: nobody answers.*goes on"):
        one.goes_on_and_on(lambda: None)
    assert one.said.count("heavy: nobody answers; asks again") == 2


def test_a_cluster_that_takes_no_job_is_given_up(
    driver: Callable[..., Driver], cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although it answers questions about jobs; that is told once."""

    def refuse(request: Request) -> bool:
        raise Unreachable("no agent is free")

    monkeypatch.setattr(cluster, "submit", refuse)
    one = driver()
    with pytest.raises(RetryableError, match="heavy: for 120 s: no agent is free"):
        one.goes_on_and_on(lambda: None)
    assert one.said == ["heavy: no agent is free; asks again"]


def test_a_run_that_is_told_to_end_takes_its_jobs_along(
    driver: Callable[..., Driver], cluster: FakeCluster, stem: str
) -> None:
    """Also one that a dead run submitted; it waits no longer than each may take to save."""
    driver(run_id="run-0").goes_on()
    one = driver(stop_deadline_s=30)
    one.goes_on()
    one.jobs.stop()
    assert cluster.stopped == [f"{stem}-1"]
    began = one.clock[0]
    one.jobs.await_end()
    assert one.clock[0] - began == 30 + module.END_S
    assert f"job {stem}-1 has not ended in time; it is not waited for" in one.said[-1]
    cluster.jobs[f"{stem}-1"] = STOPPED
    one.jobs.await_end()
    assert one.said[-1] == f"heavy: job {stem}-1 has ended"


def test_a_job_that_is_done_may_leave_in_peace(
    driver: Callable[..., Driver], cluster: FakeCluster, ledger: Ledger, stem: str
) -> None:
    """Its manifest is there, but it has MLflow to close: a run waits for that, and not for ever."""
    one = driver()
    one.goes_on()
    one.jobs.note_done(one.state)
    one.jobs.stop()
    assert cluster.stopped == []
    began = one.clock[0]
    one.jobs.await_end()
    assert one.clock[0] - began == module.END_S
    cluster.jobs[f"{stem}-1"] = Standing(status="SUCCEEDED", exit_code=0)
    one.jobs.await_end()
    assert [job.state for job in Jobs(ledger).all()] == ["finished"]


def test_another_living_runs_job_is_left_alone(
    driver: Callable[..., Driver], cluster: FakeCluster, stem: str
) -> None:
    """It goes on for that run; and one who does not want to wait is told whose it is."""
    driver(run_id="run-0").goes_on()
    one = driver(alive=("run-0",))
    one.goes_on()
    assert one.jobs.other_run(one.state) == f"job {stem}-1 of run run-0"
    one.jobs.stop()
    one.jobs.await_end()
    assert cluster.stopped == []
    assert one.said[-1] == f"heavy: job {stem}-1 of run run-0 goes on"


def test_where_no_jobs_can_be_had_the_run_drives_the_stage(
    driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head without dashboard is told once; on a Ray of the run's own there is nothing to tell."""
    one = driver()
    monkeypatch.setattr(one.jobs, "_connect", lambda: None)
    assert not one.looks()
    assert not one.jobs.is_wanted(one.state)
    assert "heavy: resources.heavy.job is own, but this cluster takes no jobs" in one.said[0]
    other = driver()
    monkeypatch.delenv("RAY_ADDRESS")
    assert not other.jobs.is_wanted(other.state)
    assert other.said == []
