"""Tests of several drivers on one store: one works on a stage, the others wait or leave."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from pipelines.driver import runner as module
from pipelines.errors import RetryableError
from pipelines.planning import plan
from pipelines.recipe import Recipe, Resources
from pipelines.store import lease
from pipelines.store.lease import Lease
from pipelines.store.ledger import Ledger
from pipelines.store.processes import Owner
from pipelines.store.stage_record import StageRecord
from tests.pipelines.driver.test_runner import Told, drive
from tests.pipelines.fake_stages import FakeStage, attempts, finish

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(120)]

OTHER = Owner.of_this_process("run-of-another")
SMALL = Resources(cpus=0.5, backoff_s=0)


class Driver:
    """A run in a thread of its own."""

    def __init__(self, recipe: Recipe, ledger: Ledger, *stages: FakeStage, run_id: str) -> None:
        self._told: Told | None = None

        def work() -> None:
            resources = dict.fromkeys((stage.name for stage in stages), SMALL)
            self._told = drive(recipe, ledger, resources, *stages, run_id=run_id)

        self._thread = threading.Thread(target=work)
        self._thread.start()

    def end(self) -> Told:
        self._thread.join(60)
        assert self._told is not None
        return self._told

    def goes_on(self, *, for_s: float) -> bool:
        """Whether it is still at it after so long."""
        self._thread.join(for_s)
        return self._thread.is_alive()


@pytest.fixture
def record(
    demo_recipe: Recipe, ledger: Ledger, use_stages: Callable[..., None]
) -> Callable[[FakeStage], StageRecord]:
    """Call it with a stage that needs nothing to get its record."""

    def find(stage: FakeStage) -> StageRecord:
        use_stages(stage)
        return plan(demo_recipe, ledger)[0].record

    return find


def held(record: StageRecord) -> Lease:
    """Another run has the stage."""
    found = lease.acquire(record.directory, OTHER)
    assert isinstance(found, Lease)
    return found


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_a_stage_of_another_run_is_waited_for(
    demo_recipe: Recipe, ledger: Ledger, record: Callable[..., StageRecord]
) -> None:
    """It says who has it; when that lets go, the stage is done here."""
    stage = FakeStage(name="shared")
    theirs = held(record(stage))
    driver = Driver(demo_recipe, ledger, stage, run_id="run-1")
    assert driver.goes_on(for_s=3)
    theirs.release()
    told = driver.end()
    assert told.ends == {"shared": "ran"}
    assert told.said[0].startswith("shared: run run-of-another on ")
    assert told.said[0].endswith("works on it; waits for it")
    assert told.said.count(told.said[0]) == 1
    assert "shared: is free again; goes on here" in told.said


def test_what_another_run_finishes_is_taken(
    demo_recipe: Recipe, ledger: Ledger, use_stages: Callable[..., None]
) -> None:
    """The stage is cached, and those that need it go on."""
    stages = FakeStage(name="shared"), FakeStage(name="after", needs=("shared",))
    use_stages(*stages)
    first = plan(demo_recipe, ledger)[0]
    with held(first.record):
        driver = Driver(demo_recipe, ledger, *stages, run_id="run-1")
        assert driver.goes_on(for_s=1)
        finish(first, {"a": {"a.txt": "theirs"}})
        told = driver.end()
    assert told.ends == {"shared": "cached", "after": "ran"}
    assert told.attempts["shared/a"] == []


def test_a_run_may_leave_instead(
    demo_recipe: Recipe, ledger: Ledger, record: Callable[..., StageRecord]
) -> None:
    """Whatever does not need the stage is done first; then it says who has it, and how to go on."""
    busy, free = FakeStage(name="busy"), FakeStage(name="free")
    with held(record(busy)):
        told = drive(demo_recipe, ledger, {}, busy, free, busy="leave")
    assert told.ends == {"busy": "failed", "free": "ran"}
    assert type(told.error) is RetryableError
    assert "stage busy: run run-of-another on " in str(told.error)


def test_two_runs_do_nothing_twice(
    demo_recipe: Recipe, ledger: Ledger, record: Callable[..., StageRecord]
) -> None:
    """Started one after the other on the same stages: every unit is done once, by either."""
    first = FakeStage(name="first", units=("a", "b", "c"), behaviour={"a": "is deaf"})
    stages = first, FakeStage(name="last", needs=("first",), units=("d", "e"))
    folder = record(first).durable_path("a")
    one = Driver(demo_recipe, ledger, *stages, run_id="run-1")
    wait_for(folder / "attempts")
    other = Driver(demo_recipe, ledger, *stages, run_id="run-2")
    assert other.goes_on(for_s=1)
    (folder / "enough").touch()
    told, theirs = one.end(), other.end()
    assert told.ends["first"] == "ran"
    assert theirs.ends["first"] == "cached"
    assert sorted([told.ends["last"], theirs.ends["last"]]) == ["cached", "ran"]
    assert {name: len(pids) for name, pids in told.attempts.items()} == dict.fromkeys(
        ("first/a", "first/b", "first/c", "last/d", "last/e"), 1
    )


def test_a_run_that_was_taken_over_stops_and_waits(
    demo_recipe: Recipe, ledger: Ledger, record: Callable[..., StageRecord]
) -> None:
    """Its late receipt is refused; when the stage is free again it goes on, and all is whole."""
    stage = FakeStage(name="shared", behaviour={"a": "is deaf"})
    mine = record(stage)
    driver = Driver(demo_recipe, ledger, stage, run_id="run-1")
    wait_for(mine.durable_path("a") / "attempts")
    theirs = mine.directory / "lease" / "00000002.json"
    document = {**asdict(OTHER), "since": "today", "ttl_s": 60, "beats": 0, "released": False}
    theirs.write_text(json.dumps(document))
    (mine.durable_path("a") / "enough").touch()
    assert driver.goes_on(for_s=4)
    assert mine.receipt("a") is None
    theirs.write_text(json.dumps({**document, "released": True}))
    told = driver.end()
    assert told.ends == {"shared": "ran"}
    assert len(attempts(mine, "a")) == 2
    assert any("publish refused: run run-of-another on" in line for line in told.said)
    assert told.tracker.stage_failed.call_args.args[0] == "shared"


def test_a_lost_heartbeat_ends_the_work(
    demo_recipe: Recipe,
    ledger: Ledger,
    record: Callable[..., StageRecord],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The units in flight are ended as soon as the driver hears that the stage is another's."""
    taken: list[Lease] = []
    acquire = lease.acquire

    def keep(directory: Path, owner: Owner) -> object:
        found = acquire(directory, owner)
        if isinstance(found, Lease):
            taken.append(found)
        return found

    monkeypatch.setattr(module.lease, "acquire", keep)
    stage = FakeStage(name="shared", behaviour={"a": "is deaf"})
    mine = record(stage)
    driver = Driver(demo_recipe, ledger, stage, run_id="run-1")
    wait_for(mine.durable_path("a") / "attempts")
    taken[0].lost = True
    wait_for(mine.directory / "lease" / "00000002.json")  # nobody had it: it is taken again
    (mine.durable_path("a") / "enough").touch()
    assert driver.end().ends == {"shared": "ran"}
    assert len(attempts(mine, "a")) == 2


def test_leases_are_let_go_at_the_end(
    demo_recipe: Recipe, ledger: Ledger, record: Callable[..., StageRecord]
) -> None:
    """Also of a stage that failed: the next run need not wait."""
    stage = FakeStage(name="broken", behaviour={"a": "fails"})
    drive(demo_recipe, ledger, {"broken": Resources(attempts=1)}, stage)
    with held(record(stage)) as found:
        assert found.token == 2
