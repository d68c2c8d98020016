"""Tests of the actors that units are given to, on a real Ray."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from pipelines.driver import pool as pool_module
from pipelines.driver.pool import MOST_AHEAD, MOST_FAILURES, Shape, WorkerPool
from pipelines.recipe_sections.resources import Resources
from pipelines.stage import Unit
from pipelines.store.ledger import Ledger
from pipelines.worker.execute import Task
from tests.pipelines.fake_stages import FakeStage

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(120)]

SMALL, HUGE = Resources(cpus=0.5), Resources(cpus=1000)


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    """An empty one, empty again afterwards."""
    pool = WorkerPool()
    yield pool
    pool.retire()


def shape(resources: Resources) -> Shape:
    return Shape.of(resources, {})


def task(store: Path) -> Task:
    ledger = Ledger.open(store)
    stage, unit = FakeStage(name="first"), Unit(id="a")
    return Task(store=str(ledger.store), stage=stage, fingerprint="f0", inputs={}, unit=unit)


def test_a_unit_is_given_to_a_worker_that_is_there(pool: WorkerPool, tmp_path: Path) -> None:
    """Not before; and the worker serves the next unit too."""
    first = task(tmp_path / "store")
    assert pool.dispatch(first, SMALL) is None
    assert pool.hire(shape(SMALL), SMALL)
    ray.wait(pool.arriving, timeout=60)
    started = pool.dispatch(first, SMALL)
    assert started is not None
    assert ray.get(started.reference).unit == "a"
    assert (pool.arriving, pool.dispatch(first, SMALL)) == ([], None)
    pool.release(started.reference, lost=False)
    assert pool.dispatch(first, SMALL) is not None


def test_what_has_no_room_is_not_asked_for(pool: WorkerPool) -> None:
    """On this machine nothing would ever come of it."""
    assert not pool.hire(shape(HUGE), HUGE)
    assert pool.arriving == []


def test_on_others_cluster_some_are_asked_for_ahead(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it may grow; they hold nothing up, neither units nor workers of another shape."""
    monkeypatch.setattr(pool_module, "is_joined", lambda: True)
    asked = [pool.hire(shape(HUGE), HUGE) for _ in range(MOST_AHEAD + 1)]
    assert asked == [True] * MOST_AHEAD + [False]
    assert pool.num_arriving(shape(HUGE)) == MOST_AHEAD
    assert pool.hire(shape(SMALL), SMALL)
    pool.retire()
    assert pool.arriving == []


def test_who_is_not_waited_for_makes_way(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """While another shape waits, workers that were asked for too often go, and idle ones."""
    monkeypatch.setattr(pool_module, "is_joined", lambda: True)
    assert pool.hire(shape(SMALL), SMALL)
    ray.wait(pool.arriving, timeout=60)
    first = task(tmp_path / "store")
    started = pool.dispatch(first, SMALL)
    assert started is not None
    pool.release(started.reference, lost=False)
    for _ in range(2):
        assert pool.hire(shape(HUGE), HUGE)
    pool.make_way({shape(HUGE): 1})
    assert pool.num_arriving(shape(HUGE)) == 1
    assert pool.dispatch(first, SMALL) is None


def test_workers_that_take_nothing_are_not_asked_for_ahead(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would come at once, one for each unit."""
    monkeypatch.setattr(pool_module, "is_joined", lambda: True)
    nothing = Resources(cpus=0)
    asked = [
        pool.hire(shape(nothing), nothing) for _ in range(int(ray.cluster_resources()["CPU"]) + 1)
    ]
    assert asked == [True] * (len(asked) - 1) + [False]


def test_a_group_that_nobody_is_of_has_no_room(pool: WorkerPool) -> None:
    """Nodes of other groups do not count."""
    elsewhere = Resources(cpus=0.5, node_group="elsewhere")
    assert not pool.hire(shape(elsewhere), elsewhere)


def test_workers_that_never_come_are_told_of(pool: WorkerPool, tmp_path: Path) -> None:
    """After some in a row, with why; then it is tried anew."""
    deadline = time.monotonic() + 100
    for _ in range(MOST_FAILURES):
        assert pool.refusal(shape(SMALL)) is None
        assert pool.hire(shape(SMALL), SMALL)
        (worker,) = (one.worker for one in pool._arriving.values())
        ray.kill(worker)
        while pool.arriving and time.monotonic() < deadline:
            assert pool.dispatch(task(tmp_path / "store"), SMALL) is None
            time.sleep(0.05)
    assert isinstance(pool.refusal(shape(SMALL)), ray.exceptions.RayActorError)
    assert pool.refusal(shape(SMALL)) is None
