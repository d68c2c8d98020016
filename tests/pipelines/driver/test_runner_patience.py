"""Tests of how long a run waits for units, and of what it does about those that do not come."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

from pipelines.errors import RetryableError, StageFailed
from pipelines.recipe import Recipe, Resources
from pipelines.store import lease
from pipelines.store.ledger import Ledger
from tests.pipelines.driver.test_runner import drive
from tests.pipelines.driver.test_runner_stop import durable, meanwhile
from tests.pipelines.fake_stages import FakeStage, FakeTraining

__all__ = ["durable"]  # the fixture
pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(120)]


@contextmanager
def others_at_work() -> Iterator[None]:
    """Every CPU of the cluster is taken by somebody else."""

    @ray.remote
    class Other:
        def is_there(self) -> bool:
            return True

    actor = Other.options(num_cpus=ray.cluster_resources()["CPU"]).remote()
    assert ray.get(actor.is_there.remote(), timeout=60)
    try:
        yield
    finally:
        ray.kill(actor)


def test_a_unit_that_takes_too_long_is_ended(demo_recipe: Recipe, ledger: Ledger) -> None:
    """Each time one attempt is spent, in a process of its own; its sibling is not touched."""
    stage = FakeStage(name="slow", units=("a", "b"), behaviour={"a": "is deaf"})
    resources = Resources(cpus=0.5, attempts=2, timeout_s=1, backoff_s=0)
    told = drive(demo_recipe, ledger, {"slow": resources}, stage)
    assert type(told.error) is StageFailed
    assert told.states["slow"].failures["a"] == (
        "TookTooLong: not done after 1 s (resources.slow.timeout_s), and ended"
    )
    first, second = told.attempts["slow/a"]
    assert first != second
    assert len(told.attempts["slow/b"]) == 1
    assert 2 <= told.states["slow"].worker_seconds < 10


def test_only_time_at_work_counts(demo_recipe: Recipe, ledger: Ledger) -> None:
    """A unit that waits for room uses no worker; one that failed has used its."""
    stage = FakeStage(name="slow", behaviour={"a": "fails once"})
    with others_at_work():
        drive(demo_recipe, ledger, {"slow": Resources(start_deadline_s=3)}, stage)
    told = drive(demo_recipe, ledger, {"slow": Resources(attempts=2, backoff_s=0)}, stage)
    assert told.ends == {"slow": "ran"}
    assert 0 < told.states["slow"].worker_seconds < 2


def test_a_unit_that_finds_no_worker_says_what_there_is(
    demo_recipe: Recipe, ledger: Ledger
) -> None:
    """The run does not wait for ever, nor once for every unit; it may be started again."""
    stage = FakeStage(name="queued", units=("a", "b", "c"))
    resources = Resources(cpus=1, start_deadline_s=1)
    with others_at_work():
        started = time.monotonic()
        told = drive(demo_recipe, ledger, {"queued": resources}, stage)
        assert time.monotonic() - started < 10
    assert type(told.error) is RetryableError
    text = str(told.error)
    assert "no worker had begun after 1 s (resources.queued.start_deadline_s)" in text
    assert "asked for 1 workers of 1 CPUs; the cluster, of 1 nodes, has free 0 CPUs" in text
    patient = Resources(cpus=1)
    assert drive(demo_recipe, ledger, {"queued": patient}, stage).ends == {"queued": "ran"}


def test_a_unit_waits_before_it_is_tried_again(demo_recipe: Recipe, ledger: Ledger) -> None:
    """Others are done meanwhile."""
    stage = FakeStage(name="lucky", units=("a", "b", "c"), behaviour={"a": "fails once"})
    resources = Resources(cpus=1, attempts=2, backoff_s=3)
    started = time.monotonic()
    told = drive(demo_recipe, ledger, {"lucky": resources}, stage)
    assert told.ends == {"lucky": "ran"}
    assert time.monotonic() - started > 3
    record = told.states["lucky"].planned.record
    times = {unit: (record.directory / f"{unit}.txt").stat().st_mtime for unit in "abc"}
    assert times["a"] > max(times["b"], times["c"])
    assert any("tried again in 3." in line for line in told.said)


def test_the_first_failure_may_end_the_others(
    demo_recipe: Recipe, ledger: Ledger, durable: Callable[..., Path]
) -> None:
    """With `on_failure: stop` nobody waits for units whose stage has failed anyway."""
    behaviour = {"a": "is deaf", "b": "fails"}
    stages = (FakeTraining(name="slow", units=("a", "b", "c"), behaviour=behaviour),)
    resources = Resources(cpus=0.5, attempts=2, backoff_s=2, on_failure="stop")
    path = durable(stages, "slow", "a")
    with meanwhile(path / "attempts", lambda: None):
        told = drive(demo_recipe, ledger, {"slow": resources}, *stages)
    assert told.ends == {"slow": "failed"}
    assert told.said[-1].startswith("slow: ended a")
    assert str(told.error).splitlines() == [
        "stage slow: 1 of 3 units failed",
        "  b: RuntimeError: b is broken",
        "  the other units were ended or not begun; the same command does them",
    ]
    (path / "enough").touch()


def test_a_unit_of_a_lost_worker_is_fenced_off(demo_recipe: Recipe, ledger: Ledger) -> None:
    """The worker may only have been cut off: what it publishes later is refused."""
    stage = FakeStage(name="lucky", units=("a", "b"), behaviour={"a": "dies once"})
    told = drive(demo_recipe, ledger, {"lucky": Resources(attempts=2, backoff_s=0)}, stage)
    assert told.ends == {"lucky": "ran"}
    folder = told.states["lucky"].planned.record.directory
    (path,) = (folder / "lease").glob("*.json")
    token = int(path.stem)
    with pytest.raises(lease.Fenced, match="unit a was given out again"):
        lease.check(folder, token, "a", 1)
    lease.check(folder, token, "a", 2)
    lease.check(folder, token, "b", 1)
