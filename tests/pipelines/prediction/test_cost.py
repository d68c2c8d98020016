"""Tests of pipelines.prediction.cost: rates from what was measured, and sums of them."""

from collections.abc import Callable
from typing import Any

import pytest

from pipelines.planning import plan
from pipelines.prediction.cost import Cost, Rate, earlier_rate, predict
from pipelines.prediction.earlier_runs import EarlierRuns
from pipelines.recipe import Recipe, Resources
from pipelines.store.ledger import Ledger
from tests.pipelines import in_process
from tests.pipelines.fake_stages import FakeStage, finish

RATE = Rate(
    num_samples_per_unit=100, seconds=0.5, num_bytes=1000, num_out_fraction=1, source="somewhere"
)


def cost(rate: Rate = RATE, **values: Any) -> Cost:
    asked: dict[str, Any] = {
        "num_units": 3,
        "num_samples": 7200,
        "num_unsized": 0,
        "resources": Resources(cpus=2),
        "num_workers": 1,
        "prices": {},
    }
    return predict(rate, **{**asked, **values})


def test_samples_times_what_one_takes() -> None:
    """Seconds of a worker are device-hours of all the devices it holds."""
    found = cost()
    assert (found.num_samples, found.num_bytes) == (7200, 7_200_000)
    assert (found.device, found.device_hours, found.money) == ("cpu", 2.0, None)


def test_a_stage_with_gpus_is_paid_by_the_gpu() -> None:
    """Fractions count; its CPUs come with them."""
    found = cost(resources=Resources(cpus=8, gpus=0.25), prices={"gpu": 4.0, "cpu": 100.0})
    assert (found.device, found.device_hours, found.money) == ("gpu", 0.25, 1.0)


def test_units_whose_samples_are_unknown_are_taken_as_usual() -> None:
    """As many as those that were measured."""
    assert cost(num_samples=0, num_unsized=2).num_samples == 200


def test_a_stage_that_counts_no_samples_is_predicted_by_its_units() -> None:
    """Training, say; a gang's workers are counted."""
    rate = Rate(
        num_samples_per_unit=0, seconds=3600, num_bytes=5, num_out_fraction=1, source="before"
    )
    found = cost(rate, num_units=3, num_workers=2, resources=Resources(cpus=1))
    assert (found.device_hours, found.num_bytes, found.num_samples) == (6.0, 15, 7200)


@pytest.mark.parametrize(("setting", "is_known"), [("same", True), ("other", False)])
def test_the_newest_stage_that_costs_the_same_is_asked(
    ledger: Ledger,
    demo_recipe: Recipe,
    use_stages: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    is_known: bool,
) -> None:
    """Another encoder of the same name tells nothing; another picture limit does not matter."""
    monkeypatch.setattr(FakeStage, "identity", lambda self: self.setting)
    before = {"weights": "same", "limit": 1}
    use_stages(FakeStage(name="embed/t5", setting=before))
    (planned,) = plan(demo_recipe, ledger)
    finish(planned, {"a": {"a.txt": "12345678"}, "b": {"b.txt": "12"}})
    use_stages(FakeStage(name="embed/t5", setting={"weights": setting, "limit": 2}))
    (planned,) = plan(demo_recipe, ledger)
    rate = earlier_rate(planned, EarlierRuns(ledger))
    assert (rate is not None) == is_known
    if rate is not None:
        assert (rate.seconds, rate.num_bytes, rate.num_samples_per_unit) == (1.0, 5.0, 1.0)
        assert "measured by" in rate.source


def test_an_unfinished_stage_is_asked_itself(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> None:
    """What it has done so far is the best guess for the rest."""
    use_stages(FakeStage(name="ingest", units=("a", "b")))
    in_process.run_recipe(demo_recipe, ledger)
    (planned,) = plan(demo_recipe, ledger)
    planned.record.forget("b")
    rate = earlier_rate(planned, EarlierRuns(ledger))
    assert rate is not None
    assert (rate.source, rate.num_out_fraction) == ("measured by 1 of its own units", 0.5)


def test_what_was_never_measured_is_not_predicted(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> None:
    """No rate rather than a wrong one."""
    use_stages(FakeStage(name="ingest"))
    (planned,) = plan(demo_recipe, ledger)
    assert earlier_rate(planned, EarlierRuns(ledger)) is None
