"""Tests of recipe_sections.training: experts, the runs that lead to them, and wrong settings."""

from __future__ import annotations

import math

import pytest
import torch

from ediffi.noise import NoiseInterval, paper_intervals
from pipelines.errors import UserError
from pipelines.recipe import Recipe
from pipelines.recipe_file import load_recipe
from pipelines.recipe_sections.training import ExpertRun

HALVES = "[{name: a, quantiles: [0, 0.5], %s}, {name: b, quantiles: [0.5, 1]}]"
POWER = "ema_profile=power"


def refusal(*overrides: str) -> str:
    """What the user reads when the demo recipe is changed so."""
    with pytest.raises(UserError) as caught:
        load_recipe("demo", overrides)
    return str(caught.value)


def runs(recipe: Recipe, name: str) -> list[ExpertRun]:
    """The runs that lead to an expert."""
    return recipe.experts.runs(name, recipe.noise.distribution)


def test_an_expert_comes_straight_from_the_base_by_default() -> None:
    """One run, on the interval it serves, with the settings of all."""
    recipe = load_recipe("demo")
    for name, interval in recipe.experts.intervals(recipe.noise.distribution).items():
        only = ExpertRun(name=name, interval=interval, config=recipe.experts.train)
        assert runs(recipe, name) == [only]


def test_the_papers_experts_grow_level_by_level() -> None:
    """The outer branches have their ancestors in order; the complement comes from the base."""
    recipe = load_recipe("demo", ["experts.split=paper", "experts.growth=levels"])
    assert [run.name for run in runs(recipe, "low")] == ["E1_0", "E2_0", "low"]
    assert [run.name for run in runs(recipe, "high")] == [
        *(f"E{level}_{2**level - 1}" for level in range(1, 9)),
        "high",
    ]
    assert [run.name for run in runs(recipe, "middle")] == ["middle"]
    distribution = recipe.noise.distribution
    assert runs(recipe, "high")[-1].interval == paper_intervals(distribution)["high"]
    assert runs(recipe, "low")[0].interval == NoiseInterval(0.0, distribution.quantile(0.5))


def test_halves_meet_at_the_median() -> None:
    """The split of the paper's SR256: two slices of equal probability, E^1_0 and E^1_1."""
    recipe = load_recipe("demo", ["experts.split=halves", "experts.growth=levels"])
    distribution = recipe.noise.distribution
    intervals = recipe.experts.intervals(distribution)
    assert list(intervals) == ["low", "high"]
    assert intervals["low"].sigma_max == math.exp(recipe.noise.log_mean)
    assert [one.mass(distribution) for one in intervals.values()] == pytest.approx([0.5, 0.5])
    assert [run.name for run in runs(recipe, "high")] == ["high"]  # the base is above it


def test_every_run_of_a_chain_has_a_seed_of_its_own() -> None:
    """They depend on the seed and the node alone; the expert keeps the seed it always had."""
    recipe = load_recipe("demo", ["experts.split=paper", "experts.growth=levels"])
    seeds = [run.config.seed for run in runs(recipe, "high")]
    assert len(set(seeds)) == 9
    assert seeds[-1] == recipe.experts.train.seed
    assert seeds == [run.config.seed for run in runs(recipe, "high")]
    other = load_recipe("demo", ["experts.growth=levels", "experts.train.seed=1"])
    assert runs(other, "high")[0].config.seed != seeds[0]


def test_levels_and_single_experts_may_differ_from_the_others() -> None:
    """`level` and `train` name only what is other; the rest is that of `experts.train`."""
    split = HALVES % "train: {total_images: 99, lr: 0.5}"
    recipe = load_recipe("demo", [f"experts.split={split}"])
    (own,), (plain,) = runs(recipe, "a"), runs(recipe, "b")
    assert (own.config.total_images, own.config.lr) == (99, 0.5)
    assert own.config.batch_images == plain.config.batch_images
    assert plain.config == recipe.experts.train

    level = "experts.level={total_images: 77, warmup_images: 0}"
    recipe = load_recipe("demo", ["experts.split=paper", "experts.growth=levels", level])
    assert [run.config.total_images for run in runs(recipe, "low")][:2] == [77, 77]
    assert runs(recipe, "low")[-1].config == recipe.experts.train


def test_neighbours_may_overlap_in_training_alone() -> None:
    """What is served tiles the axis; the chain leads to what is trained on."""
    split = HALVES % "trains_on: {sigma: [0, .inf]}"
    recipe = load_recipe("demo", [f"experts.split={split}", "experts.growth=levels"])
    distribution = recipe.noise.distribution
    served = recipe.experts.intervals(distribution)["a"]
    (run,) = runs(recipe, "a")
    assert served.sigma_max == distribution.quantile(0.5)
    assert run.interval == NoiseInterval(0.0, math.inf)


def test_every_draw_of_every_run_lies_in_its_range() -> None:
    """However extreme the draw, an expert and its ancestors are trained inside their intervals."""
    recipe = load_recipe("demo", ["experts.split=paper", "experts.growth=levels"])
    distribution = recipe.noise.distribution
    u_B = torch.rand(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u_B = torch.cat([u_B, torch.tensor([0.0, 2.0**-53, 1 - 2.0**-53, 1.0]).double()])
    for name in ("low", "middle", "high"):
        for run in runs(recipe, name):
            assert run.interval.contains(distribution.sigma_at(u_B, run.interval)).all()


def test_a_recipe_with_all_of_it_survives_json() -> None:
    """The record of a run gives back ranges, changes and settings."""
    split = HALVES % "trains_on: {sigma: [0, .inf]}, train: {total_images: 99}"
    recipe = load_recipe("demo", [f"experts.split={split}", "experts.start_weights=raw"])
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("setting", "needs"),
    [
        ("start_weights=raw", True),
        ("start_optimizer=inherit", True),
        ("start_ema=inherit", False),
        ("start_weights=ema", False),
    ],
)
def test_the_parents_state_is_kept_only_for_what_needs_it(setting: str, needs: bool) -> None:
    """An average that is carried on lies in the snapshot; raw weights and moments do not."""
    assert load_recipe("demo", [f"experts.{setting}"]).experts.needs_parent_state is needs


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        (
            "experts.split=" + HALVES % "train: {totl_images: 3}",
            "train of 'a': unknown field 'totl_images'; did you mean 'total_images'?",
        ),
        ("experts.split=" + HALVES % "train: {lr: -1}", "train of 'a': train.lr must be positive"),
        ("experts.split=" + HALVES % "train: {lr: fast}", "train of 'a': lr: Input should be"),
        (
            "experts.split=" + HALVES % "trains_on: {quantiles: [0, 0.4]}",
            "trains_on of 'a' must hold its whole interval [0.0, 0.7",
        ),
        (
            "experts.split=" + HALVES % "trains_on: {quantils: [0, 0.4]}",
            "experts.split.0.trains_on.quantils: unknown field; did you mean 'quantiles'?",
        ),
        ("experts.split=" + HALVES % "trains_on: {}", "a range of noise: give either"),
        ("experts.level={total_images: 5}", "experts.level counts only with growth 'levels'"),
        ("experts.split=thirds", "experts.split"),
        ("experts.growth=level", "experts.growth: Input should be 'direct' or 'levels'"),
        ("experts.start_ema=inherits", "experts.start_ema: Input should be 'restart' or 'inherit'"),
    ],
)
def test_a_wrong_setting_is_named_with_the_remedy(override: str, answer: str) -> None:
    """Also inside the changes to single experts and levels."""
    assert answer in refusal(override)


def test_an_average_that_no_parent_has_cannot_be_carried_on() -> None:
    """Profile and widths are compared along every chain, before anything is trained."""
    power = ["experts.start_ema=inherit", f"experts.train.{POWER}"]
    message = "needs ema_profile 'power' of its parent base too, got 'half_life'"
    recipe = load_recipe("demo", power[1:])
    recipe.experts.check_parents(recipe.base, recipe.noise.distribution)
    experts = recipe.experts.model_copy(update={"start_ema": "inherit"})
    with pytest.raises(ValueError, match=message):
        experts.check_parents(recipe.base, recipe.noise.distribution)

    widths = ["base.ema_track_stds=[0.05, 0.2]", f"base.{POWER}", *power[1:]]
    recipe = load_recipe("demo", widths)
    experts = recipe.experts.model_copy(update={"start_ema": "inherit"})
    with pytest.raises(ValueError, match=r"widths \[0.1\] in ema_track_stds, got \[0.05, 0.2\]"):
        experts.check_parents(recipe.base, recipe.noise.distribution)
    experts.check_parents(recipe.experts.train, recipe.noise.distribution)


def test_all_settings_of_all_runs_can_be_checked() -> None:
    """`configs` names every run of every expert, so that each is checked against the machine."""
    recipe = load_recipe("demo", ["experts.split=paper", "experts.growth=levels"])
    configs = recipe.experts.configs(recipe.noise.distribution)
    assert len(configs) == 3 + 1 + 9
    assert configs["experts, low, low"] == recipe.experts.train
