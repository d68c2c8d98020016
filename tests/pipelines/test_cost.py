"""Tests of pipelines.cost: what runs took, by their records and by receipts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from pipelines.cost import RunCost, StageCost, cost_of_run
from pipelines.planning import PlannedStage, plan
from pipelines.recipe import Recipe
from pipelines.stage import Json
from pipelines.store.ledger import Ledger
from tests.pipelines.fake_stages import FakeStage, manifest, receipt, write_run


@dataclass
class Store:
    """Two stages that a first run made: three experts of two workers, and an embedding."""

    ledger: Ledger
    resolved: Json
    planned: dict[str, PlannedStage]

    def row(self, stage: str, state: str, **values: Any) -> Json:
        """A stage's row in a run's record."""
        fingerprint = self.planned[stage].fingerprint
        return {
            "name": stage,
            "fingerprint": fingerprint,
            "state": state,
            "seconds": 10.0,
            "units": 3,
            "path": "",
            **values,
        }

    def run(self, run_id: str, *rows: Json) -> RunCost:
        """What a run with these rows took."""
        record = write_run(self.ledger, run_id, resolved=self.resolved, stages=list(rows))
        return cost_of_run(self.ledger, record)


@pytest.fixture
def store(ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]) -> Store:
    """The demo's resources: experts of so many workers of one CPU as the recipe says."""
    use_stages(FakeStage(name="embed/t5"), FakeStage(name="experts", needs=("embed/t5",)))
    planned = {one.name: one for one in plan(demo_recipe, ledger)}
    embedded = [receipt(name, num_in=500, num_out=500, seconds=4.0) for name in ("a", "b")]
    manifest(planned["embed/t5"].record.directory, *embedded, stage="embed/t5")
    experts = [receipt(name, num_in=2000, num_out=2000, seconds=100.0) for name in ("low", "high")]
    manifest(planned["experts"].record.directory, *experts, stage="experts")
    return Store(ledger, demo_recipe.model_dump(mode="json"), planned)


def test_what_a_run_spent_stands_in_its_record(store: Store) -> None:
    """Seconds of workers times the CPUs of each; attempts that failed are in it."""
    spent = {"worker_seconds": 300.0, "cpus": 2.0, "gpus": 0.0}
    (one,) = store.run("run-1", store.row("experts", "ran", **spent)).stages
    assert (one.device, one.device_s) == ("cpu", 600.0)
    assert one.made_by == "run-1"
    assert one.num_images == 4000
    assert one.device_s_per_thousand_images == pytest.approx(150.0)
    assert not one.is_lower_bound


def test_gpus_count_before_cpus(store: Store) -> None:
    """A fraction of one, too."""
    spent = {"worker_seconds": 300.0, "cpus": 8.0, "gpus": 0.5}
    found = store.run("run-1", store.row("experts", "ran", **spent))
    assert (found.stages[0].device, found.stages[0].device_s) == ("gpu", 150.0)
    assert found.device_hours("gpu") == pytest.approx(150 / 3600)
    assert found.device_hours("cpu") == 0.0
    assert found.money({"experts": 36.0, "base": 1.0}) == pytest.approx(1.5)


def test_a_stage_of_ones_own_tells_how_many_worked_at_a_unit(store: Store) -> None:
    """Only its row knows whether its class is one for gangs."""
    spent = {"worker_seconds": 64.0, "cpus": 2.0, "gpus": 0.0, "num_workers": 4}
    (one,) = store.run("run-1", store.row("embed/t5", "ran", **spent)).stages
    assert one.device_s_by_unit == {"a": 32.0, "b": 32.0}


def test_experts_are_told_one_by_one(store: Store, demo_recipe: Recipe) -> None:
    """By the attempts that made them, all workers of each."""
    num_workers = demo_recipe.resources_of("experts").num_workers
    spent = {"worker_seconds": 300.0, "cpus": 1.0, "gpus": 0.0}
    (one,) = store.run("run-1", store.row("experts", "ran", **spent)).stages
    each = 100.0 * num_workers
    assert one.device_s_by_unit == {"high": each, "low": each}


def test_a_cached_stage_saved_what_its_runs_took(store: Store) -> None:
    """Also those that were stopped midway; the one that found it spent nothing."""
    spent = {"cpus": 1.0, "gpus": 0.0}
    store.run("run-0", store.row("embed/t5", "failed", worker_seconds=30.0, **spent))
    store.run("run-1", store.row("embed/t5", "ran", worker_seconds=12.0, **spent))
    found = store.run("run-2", store.row("embed/t5", "cached", seconds=0.0))
    (one,) = found.stages
    assert (one.device_s, one.saved_device_s, one.is_lower_bound) == (0.0, 42.0, False)
    assert one.device_s_per_thousand_images == pytest.approx(42.0)
    assert found.saved_device_hours("cpu") == pytest.approx(42 / 3600)
    assert found.saved_money({"embed/t5": 3600.0}) == pytest.approx(42.0)


def test_records_that_do_not_say_are_filled_from_receipts(
    store: Store, demo_recipe: Recipe
) -> None:
    """Of a time before this was counted, or of a run that was killed: a lower bound."""
    resources = demo_recipe.resources_of("embed/t5")
    (one,) = store.run("run-1", store.row("embed/t5", "ran")).stages
    assert one.device_s == pytest.approx(8.0 * resources.cpus)
    assert one.is_lower_bound
    (found,) = store.run("run-2", store.row("embed/t5", "cached")).stages
    assert found.saved_device_s == pytest.approx(8.0 * resources.cpus)
    assert found.is_lower_bound


def test_units_that_were_kept_are_saved(store: Store) -> None:
    """A run that did one of two shards saved the other, at least."""
    spent = {"worker_seconds": 5.0, "cpus": 1.0, "gpus": 0.0}
    (one,) = store.run("run-1", store.row("embed/t5", "ran", **spent)).stages
    assert (one.device_s, one.saved_device_s, one.is_lower_bound) == (5.0, 3.0, True)


def test_a_stage_that_failed_has_cost_something(store: Store) -> None:
    """Nothing is published, and there is nothing to divide by."""
    (store.planned["experts"].record.directory / "manifest.json").unlink()
    spent = {"worker_seconds": 7.0, "cpus": 2.0, "gpus": 0.0}
    (one,) = store.run("run-1", store.row("experts", "failed", **spent)).stages
    assert (one.device_s, one.saved_device_s, one.num_images) == (14.0, 0.0, 0)
    assert one.device_s_per_thousand_images == 0.0
    assert one.made_by == ""


def test_the_same_figures_for_every_run() -> None:
    """MLflow compares runs by names, so names do not depend on what ran."""
    stage = StageCost(stage="base", state="ran", device="cpu", device_s=3600.0)
    full = RunCost(run_id="r", state="finished", stages=(stage,)).metrics()
    empty = RunCost(run_id="r", state="finished", stages=()).metrics()
    assert full.keys() == empty.keys()
    assert full["cost/device_hours_cpu"] == 1.0
    assert set(empty.values()) == {0.0}


def test_a_recipe_of_another_version_hinders_nothing(store: Store) -> None:
    """Its resources are taken to be one CPU."""
    store.resolved = {"name": "old", "no_such_section": {}}
    (one,) = store.run("run-1", store.row("embed/t5", "ran")).stages
    assert one.device_s == 8.0
