"""Tests of pipelines.prediction.training: what was trained before tells what will be."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pipelines.planning import PlannedStage, plan
from pipelines.prediction.cost import Cost
from pipelines.prediction.earlier_runs import EarlierRuns
from pipelines.prediction.training import training_cost, training_rate, training_work
from pipelines.recipe import CacheRecipe, Recipe
from pipelines.recipe_file import load_recipe
from pipelines.store.ledger import Ledger
from tests.pipelines.fake_stages import FakeTraining, manifest, receipt, write_run

NUM_BASE_IMAGES, BASE_S = 1000, 50.0  # what was trained before: 20 images a second


@pytest.fixture
def filled(ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]) -> Ledger:
    """A store in which a base like the demo's was trained, by two workers for 50 seconds."""
    use_stages(FakeTraining(name="base", units=("base",), setting="before"))
    (planned,) = plan(demo_recipe, ledger)
    planned.record.open({}, {})
    trained = receipt("base", num_in=NUM_BASE_IMAGES, num_out=NUM_BASE_IMAGES, seconds=BASE_S)
    made = manifest(planned.record.directory, trained, stage="base")
    row = {"name": "base", "fingerprint": made.fingerprint, "state": "ran", "seconds": 60.0}
    row |= {"worker_seconds": 2 * BASE_S, "cpus": 1.0, "gpus": 0.0, "units": 1, "path": ""}
    recipe = demo_recipe.model_dump(mode="json")
    write_run(ledger, "run-1", resolved=recipe, stages=[row])
    use_stages(
        FakeTraining(name="base", units=("base",), setting="now"),
        FakeTraining(name="experts", units=tuple(expert_images(demo_recipe)), needs=("base",)),
    )
    return ledger


def expert_images(recipe: CacheRecipe) -> dict[str, int]:
    work = training_work(recipe, "experts")
    assert work is not None
    return dict(work.images)


def predicted(
    recipe: Recipe, ledger: Ledger, stage: str, *, is_fresh: bool = True
) -> tuple[Cost | None, PlannedStage]:
    """What the recipe's stage will take by what lies in the store."""
    planned = next(one for one in plan(recipe, ledger) if one.name == stage)
    work = training_work(recipe, stage)
    assert work is not None
    rate = training_rate(work, planned, EarlierRuns(ledger))
    if rate is None:
        return None, planned
    resources, prices = recipe.resources_of(stage), {"cpu": 3.6}
    return training_cost(work, rate, planned, resources, prices, is_fresh=is_fresh), planned


def test_another_length_takes_as_long_an_image(filled: Ledger, demo_recipe: Recipe) -> None:
    """Ten times the images take ten times as long, on all devices of the gang; the run is named."""
    images = 10 * NUM_BASE_IMAGES
    base = replace(demo_recipe.base, total_images=images)
    recipe = demo_recipe.model_copy(update={"base": base})
    resources = recipe.resources_of("base")
    cost, _ = predicted(recipe, filled, "base")
    assert cost is not None
    seconds = base.final_images * BASE_S / NUM_BASE_IMAGES
    assert cost.num_samples == base.final_images
    assert cost.seconds == pytest.approx(seconds)
    hours = seconds / 3600 * resources.num_workers * resources.cpus
    assert cost.device_hours == pytest.approx(hours)
    assert cost.money == pytest.approx(hours * 3.6)
    assert cost.source == "measured by base of run run-1"


def test_a_base_tells_what_its_experts_will_take(filled: Ledger, demo_recipe: Recipe) -> None:
    """They are networks of the same size; only where they get the same devices."""
    resources = {**demo_recipe.resources, "experts": demo_recipe.resources_of("base")}
    recipe = demo_recipe.model_copy(update={"resources": resources})
    work = training_work(recipe, "base"), training_work(recipe, "experts")
    assert work[0] is not None
    assert work[1] is not None
    cost, _ = predicted(recipe, filled, "experts")
    if work[0].speed != work[1].speed:  # the demo's experts are trained otherwise
        assert cost is None
        train = replace(demo_recipe.base, total_images=demo_recipe.experts.train.total_images)
        experts = demo_recipe.experts.model_copy(update={"train": train})
        recipe = recipe.model_copy(update={"experts": experts})
        cost, _ = predicted(recipe, filled, "experts")
    assert cost is not None
    images = expert_images(recipe)
    total_s = sum(images.values()) * BASE_S / NUM_BASE_IMAGES
    assert cost.num_samples == sum(images.values())
    assert cost.device_hours == pytest.approx(total_s / 3600 * resources["experts"].num_workers)


@pytest.mark.parametrize(
    "changes",
    [
        ["network.widths=[8,8]"],
        ["base.batch_images=64"],
        ["base.precision=bf16"],
        ["resources.base.cpus=0.5"],
        ["resources.base.num_workers=1"],
    ],
)
def test_what_an_image_costs_otherwise_is_not_predicted(filled: Ledger, changes: list[str]) -> None:
    """Another network, another way to train or other devices: no figure rather than a wrong one."""
    recipe = load_recipe("demo", changes)
    cost, _ = predicted(recipe, filled, "base")
    assert cost is None


def test_what_does_not_matter_for_speed_does_not_matter(filled: Ledger) -> None:
    """Learning rate, averages, how often something is written."""
    recipe = load_recipe("demo", ["base.lr=0.123", "base.checkpoint_images=100000"])
    cost, _ = predicted(recipe, filled, "base")
    assert cost is not None


def test_what_was_trained_already_is_left_out(filled: Ledger, demo_recipe: Recipe) -> None:
    """Of a unit under way the images that it has reported, once its inputs are there."""
    cost, planned = predicted(demo_recipe, filled, "base", is_fresh=False)
    assert cost is not None
    durable: Any = planned.record.durable_path("base")
    durable.mkdir(parents=True)
    (durable / "progress.jsonl").write_text('{"images": 256, "loss": 1.0}\n')
    less, _ = predicted(demo_recipe, filled, "base", is_fresh=False)
    assert less is not None
    assert less.num_samples == cost.num_samples - 256
    again, _ = predicted(demo_recipe, filled, "base", is_fresh=True)
    assert again is not None
    assert again.num_samples == cost.num_samples


def test_resumed_training_counts_what_it_did_itself(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> None:
    """The last attempt's seconds belong to the images after its checkpoint."""
    use_stages(FakeTraining(name="base", units=("base",)))
    (planned,) = plan(demo_recipe, ledger)
    planned.record.open({}, {})
    timings = {"resumed_from_images": 900.0}
    trained = receipt("base", num_in=1000, num_out=1000, seconds=5.0, timings=timings)
    manifest(planned.record.directory, trained, stage="base")
    write_run(ledger, "run-1", resolved=demo_recipe.model_dump(mode="json"))
    work = training_work(demo_recipe, "base")
    assert work is not None
    rate = training_rate(work, planned, EarlierRuns(ledger))
    assert rate is not None
    assert rate.seconds == pytest.approx(0.05)
    assert rate.num_at_once == 0.0


def test_a_run_that_is_gone_tells_nothing(filled: Ledger, demo_recipe: Recipe) -> None:
    """Without its record nobody knows what it was trained on."""
    (filled.store / "runs" / "run-1.json").unlink()
    cost, _ = predicted(demo_recipe, filled, "base")
    assert cost is None


def test_stages_that_train_nothing_have_no_training_work(demo_recipe: Recipe) -> None:
    """Embedding, sampling and the rest are predicted by their samples."""
    assert training_work(demo_recipe, "embed/t5") is None
    assert training_work(demo_recipe, "sample") is None
