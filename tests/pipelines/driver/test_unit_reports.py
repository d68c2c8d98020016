"""Tests of pipelines.driver.unit_reports: what units write, passed on once each."""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock, create_autospec

import pytest

from pipelines.driver.progress import Progress
from pipelines.driver.stage_state import StageState
from pipelines.driver.unit_reports import UnitReports
from pipelines.planning import plan
from pipelines.recipe import Recipe, Resources
from pipelines.stage import Unit
from pipelines.store.ledger import Ledger
from pipelines.tracking.tracker import Tracker
from pipelines.worker.durable import Durable
from pipelines.worker.execute import Task
from tests.pipelines.fake_stages import FakeTraining


class Told:
    """A driver at work on one unit, and what it told people and MLflow."""

    def __init__(self, ledger: Ledger, recipe: Recipe) -> None:
        (planned,) = plan(recipe, ledger)
        self.task = Task(
            store=str(ledger.store),
            stage=planned.stage,
            fingerprint=planned.fingerprint,
            inputs=planned.inputs,
            unit=Unit(id="a"),
        )
        self.state = StageState(planned=planned, resources=Resources(), state="running")
        self.state.num_units = 1
        self.tracker: Mock = create_autospec(Tracker, instance=True)
        self.progress: Mock = create_autospec(Progress, instance=True)
        self.reports = UnitReports(self.tracker, self.progress)
        self.reports.begin(self.state, self.task)

    def send(self) -> None:
        self.reports.send(self.state, self.task)

    @property
    def said(self) -> list[str]:
        return [one.args[0] for one in self.progress.say.call_args_list]

    @property
    def rows(self) -> list[float]:
        calls = self.tracker.progress.call_args_list
        return [row["images"] for one in calls for row in one.args[2]]

    @property
    def grids(self) -> list[str]:
        calls = self.tracker.grids.call_args_list
        return [name for one in calls for name in one.args[2]]


@pytest.fixture
def driver(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> Callable[[], Told]:
    """Call it to get a new driver of the same unit."""
    use_stages(FakeTraining(name="base"))
    return lambda: Told(ledger, demo_recipe)


def attempt(told: Told, images: int, *notices: str, grid: bool = False) -> None:
    """What a worker writes: words, a picture, then a row."""
    with Durable(told.task.durable_path) as durable:
        for notice in notices:
            durable.notice(notice)
        if grid:
            folder = durable.path / "grids"
            folder.mkdir(exist_ok=True)
            (folder / f"images-{images:010d}.png").write_text("png")
        durable.report({"images": images, "loss": 0.5})


def test_each_thing_is_passed_on_once(driver: Callable[[], Told]) -> None:
    """However often the driver looks: rows and pictures to MLflow, words to people alone."""
    told = driver()
    told.send()
    attempt(told, 10, "a spike at 7 images")
    told.send()
    attempt(told, 20, grid=True)
    for _ in range(3):
        told.send()
    assert told.said == ["base/a: a spike at 7 images"]
    assert told.rows == [10, 20]
    assert told.grids == ["images-0000000020.png"]
    assert told.tracker.grids.call_args.args[:2] == ("base", "a")


def test_a_resumed_unit_does_not_repeat_itself(driver: Callable[[], Told]) -> None:
    """Old words stay unsaid in a new run; its MLflow run is new and gets rows and pictures."""
    first = driver()
    attempt(first, 10, "a spike at 7 images", grid=True)
    first.send()
    second = driver()
    attempt(second, 10, "a spike at 7 images", "a checkpoint is damaged")
    second.send()
    assert second.said == ["base/a: a checkpoint is damaged"]
    assert second.rows == [10]
    assert second.grids == ["images-0000000010.png"]


def test_units_that_report_nothing_are_nothing(driver: Callable[[], Told]) -> None:
    """A stage's bar still moves."""
    told = driver()
    told.reports.show([told.state], [(told.state, told.task)], force=True)
    told.progress.update.assert_called_once_with("base", 0, {})
    assert told.rows == []
    attempt(told, 10)
    told.reports.show([told.state], [(told.state, told.task)])  # too soon to look again
    assert told.rows == []
    told.reports.show([told.state], [(told.state, told.task)], force=True)
    assert told.rows == [10]
    assert not Path(told.task.store, "runs").exists()
