"""Tests of a run that is told to end: training saves, the rest is left, and nothing has failed."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.errors import RetryableError
from pipelines.planning import plan
from pipelines.recipe import Recipe, Resources
from pipelines.store.ledger import Ledger
from pipelines.store.stopping import Interruption
from tests.pipelines.driver.test_runner import drive
from tests.pipelines.fake_stages import FakeStage, FakeTraining, attempts

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(120)]

HALF = Resources(cpus=0.5, stop_deadline_s=60)


@contextmanager
def meanwhile(path: Path, act: Callable[[], object]) -> Iterator[None]:
    """Act once a file appears, while the test goes on."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < deadline, f"{path} did not appear"
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()


@pytest.fixture
def durable(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> Callable[[Sequence[FakeStage], str, str], Path]:
    """Call it with stages, one's name and a unit to get the unit's durable folder."""

    def find(stages: Sequence[FakeStage], name: str, unit: str) -> Path:
        use_stages(*stages)
        record = next(one.record for one in plan(demo_recipe, ledger) if one.name == name)
        path = record.durable_path(unit)
        assert isinstance(path, Path)
        return path

    return find


def test_training_saves_and_the_rest_is_left(
    demo_recipe: Recipe, ledger: Ledger, durable: Callable[..., Path]
) -> None:
    """No failure, no attempt spent, no mark left behind; and what cannot stop is not waited for."""
    stages = (
        FakeTraining(name="base", behaviour={"a": "trains once"}),
        FakeStage(name="slow", behaviour={"a": "is deaf"}),
    )
    resources = {"base": HALF, "slow": HALF}
    interruption, error = Interruption(), RetryableError("told to end")
    slow = durable(stages, "slow", "a") / "attempts"
    base = durable(stages, "base", "a") / "trains"

    def tell() -> None:
        with meanwhile(slow, lambda: setattr(interruption, "error", error)):
            pass

    with meanwhile(base, tell):
        told = drive(demo_recipe, ledger, resources, *stages, interruption=interruption)
    (slow.parent / "enough").touch()
    assert told.error is error
    assert told.said == [
        "told to end: waits for base/a (60 s) to save; once more to leave at once",
        "base/a: stopped as asked after 7 images; a checkpoint was saved, "
        "and the same command goes on from there",
    ]
    assert told.ends == {"base": "running", "slow": "running"}
    assert not any(state.failures for state in told.states.values())
    assert list((ledger.store / "runs").glob("*.stop")) == []
    again = drive(demo_recipe, ledger, resources, stages[0])
    assert again.ends == {"base": "ran"}
    receipt = again.states["base"].planned.record.receipt("a")
    assert receipt is not None
    assert receipt.attempt == 1


def test_nothing_in_flight_that_could_save_ends_at_once(
    demo_recipe: Recipe, ledger: Ledger, durable: Callable[..., Path]
) -> None:
    """Nothing is said and nobody waits."""
    stages = (FakeStage(name="slow", behaviour={"a": "is deaf"}),)
    interruption = Interruption()
    path = durable(stages, "slow", "a")

    def tell() -> None:
        interruption.error = RetryableError("told to end")

    with meanwhile(path / "attempts", tell):
        told = drive(demo_recipe, ledger, {"slow": HALF}, *stages, interruption=interruption)
    (path / "enough").touch()
    assert told.error is interruption.error
    assert told.said == []


def test_a_deadline_is_kept(
    demo_recipe: Recipe, ledger: Ledger, durable: Callable[..., Path]
) -> None:
    """Training that does not end in time is left to its last checkpoint, and that is said."""
    stages = (FakeTraining(name="base", behaviour={"a": "is deaf"}),)
    interruption = Interruption()
    path = durable(stages, "base", "a")
    started: list[float] = []

    def tell() -> None:
        started.append(time.monotonic())
        interruption.error = KeyboardInterrupt()

    resources = {"base": Resources(cpus=0.5, stop_deadline_s=1)}
    with (
        meanwhile(path / "attempts", tell),
        pytest.raises(KeyboardInterrupt),
    ):
        drive(demo_recipe, ledger, resources, *stages, interruption=interruption)
    (path / "enough").touch()
    assert time.monotonic() - started[0] >= 1
    assert list((ledger.store / "runs").glob("*.stop")) == []


def test_a_worker_that_is_told_to_end_alone_is_replaced(
    demo_recipe: Recipe, ledger: Ledger, durable: Callable[..., Path]
) -> None:
    """A node that is taken away: its unit goes on elsewhere, and no attempt is spent."""
    stage = FakeTraining(name="base", behaviour={"a": "trains once"})
    path = durable((stage,), "base", "a")

    def take_away() -> None:
        os.kill(int((path / "attempts").read_text()), signal.SIGTERM)

    with meanwhile(path / "trains", take_away):
        told = drive(demo_recipe, ledger, {"base": Resources(attempts=1)}, stage)
    assert told.ends == {"base": "ran"}
    first, second = attempts(told.states["base"].planned.record, "a")
    assert first != second
    assert any("stopped as asked after 7 images" in line for line in told.said)
