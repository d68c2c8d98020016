"""Tests of pipelines.stages.assemble: an ensemble directory, and the cascade inside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ediffi.cascade import read_cascade
from ediffi.conditioning import StreamConfig
from ediffi.ensemble_file import load_base, load_ensemble, read_ensemble_info
from ediffi.network import NetworkConfig, build_network
from ediffi.noise import WHOLE, NoiseInterval
from ediffi.preconditioning import Preconditioning
from ediffi.snapshot import Snapshot, SnapshotError, load_snapshot, save_snapshot
from pipelines.recipe import Recipe
from pipelines.recipe_file import load_recipe
from pipelines.stage import Manifest, Outcome, Receipt, Unit, Workspace
from pipelines.stages.assemble import Assemble
from pipelines.stages.untrained_experts import missing_experts
from tests.pipelines.fake_stages import manifest, receipt

STREAMS = (StreamConfig(name="t5", token_width=4),)
T5 = "encoders={t5: {family: transformers, weights: some/t5}}"
NETWORK = """{image_px: 8, patch_px: 1, widths: [8], num_blocks: 1, cross_attention_px: [8],
             head_width: 8, context_width: 8, embedding_width: 8}"""
TRAIN = """{total_images: 32, batch_images: 16, ema_half_life_images: 16, checkpoint_images: 16,
            log_images: 16}"""
SMALL = "widths: [8], num_blocks: [1], head_width: 8, context_width: 8, embedding_width: 8"
# In the order in which nobody would enlarge.
MODELS = f"""{{
    a32: {{image_px: 32, low_res_px: 16, patch_px: 16, train: {TRAIN},
          network: {{{SMALL}, cross_attention_px: [8]}}}},
    b16: {{image_px: 16, low_res_px: 8, train: {TRAIN}, experts: {{train: {TRAIN}}},
          network: {{{SMALL}, cross_attention_px: [8]}}}}}}"""


def recipe_of(*overrides: str) -> Recipe:
    """A base of 8 px with one encoder, features and alignment of nothing that is not there."""
    features = "evaluate.features={kind: timm, model: x, weights: y}"
    sizes = ("data.image_px=32", f"network={NETWORK}")
    base = (T5, features, "evaluate.alignment=shapes", "clip_fit=null", *sizes)
    return load_recipe("demo", [*base, *overrides])


def trained(
    directory: Path,
    stage: str,
    network: NetworkConfig,
    recipe: Recipe,
    *untrained: str,
    **units: NoiseInterval,
) -> Manifest:
    """A finished stage whose units are snapshots of random weights, but for those untrained."""
    for index, (unit, interval) in enumerate(units.items()):
        if unit in untrained:
            continue
        torch.manual_seed(hash(network) % 1000 + index)
        snapshot = Snapshot(
            network=network,
            preconditioning=Preconditioning(),
            distribution=recipe.noise.distribution,
            interval=interval,
            images_seen=32,
        )
        save_snapshot(directory / stage / unit, snapshot, build_network(network).state_dict())
    receipts = [stand_in(unit) if unit in untrained else receipt(unit) for unit in units]
    return manifest(directory / stage, *receipts, stage=stage)


def stand_in(unit: str) -> Receipt:
    """The receipt of an expert that could not be trained."""
    return receipt(unit, rejects={"stand_in": [unit]}, facts={"stand_in": "base"})


def assemble(recipe: Recipe, directory: Path, *untrained: str) -> Outcome:
    """Run the stage on random snapshots of everything that the recipe trains.

    Args:
        untrained: experts, of the base or of a model, that something stands in for.
    """
    distribution = recipe.noise.distribution
    base = recipe.network.config(recipe.base_px, STREAMS)
    intervals = recipe.experts.intervals(distribution)
    inputs = {
        "base": trained(directory, "base", base, recipe, base=WHOLE),
        "experts": trained(directory, "experts", base, recipe, *untrained, **intervals),
    }
    for name, model in recipe.super_resolution.items():
        network, stage = model.network_config(STREAMS), f"super_resolution/{name}"
        inputs[stage] = trained(directory, stage, network, recipe, **{name: WHOLE})
        if model.experts is not None:
            stage = f"super_resolution_experts/{name}"
            halves = model.experts.intervals(distribution)
            inputs[stage] = trained(directory, stage, network, recipe, *untrained, **halves)
    stage = Assemble(recipe=recipe, embeds=())
    assert set(stage.needs) == set(inputs)
    scratch = directory / "scratch"
    workspace = Workspace(scratch=scratch, durable=directory / "durable", inputs=inputs)
    return stage.run(Unit(id="ensemble"), workspace)


@pytest.fixture
def cascade(tmp_path: Path) -> Outcome:
    """What assembling the two models leaves."""
    return assemble(recipe_of(f"super_resolution={MODELS}"), tmp_path)


def test_without_super_resolution_there_is_no_cascade(tmp_path: Path) -> None:
    """The directory is that of before: experts, base and the record, which comes last."""
    outcome = assemble(recipe_of(), tmp_path)
    assert list(outcome.files) == [
        *(f"ensemble/{name}.safetensors" for name in ("base", "high", "low", "middle")),
        "ensemble/ensemble.json",
    ]
    assert (outcome.num_in, outcome.num_out) == (3, 1)
    assert read_cascade(tmp_path / "scratch" / "ensemble") == ()


def test_a_cascade_enlarges_in_order_of_size(tmp_path: Path, cascade: Outcome) -> None:
    """Whatever the order of the recipe, each model is an ensemble of its own experts."""
    directory = tmp_path / "scratch" / "ensemble"
    paths = read_cascade(directory)
    assert [path.name for path in paths] == ["b16", "a32"]
    names = [[one.name for one in read_ensemble_info(path).experts] for path in paths]
    assert names == [["low", "high"], ["whole"]]
    assert cascade.num_in == 3 + 2 + 1

    found = load_base(paths[0]).network.state_dict()
    expected = load_snapshot(tmp_path / "super_resolution/b16/b16")[1].network.state_dict()
    assert all(torch.equal(found[name], one) for name, one in expected.items())
    info, ensemble = load_ensemble(paths[1])
    assert (info.base, info.network.image_px) == (None, 16)
    expected = load_snapshot(tmp_path / "super_resolution/a32/a32")[1].network.state_dict()
    whole = ensemble.experts[0].network.state_dict()
    assert all(torch.equal(whole[name], one) for name, one in expected.items())


def test_the_files_of_a_cascade_are_complete_before_its_record(
    tmp_path: Path, cascade: Outcome
) -> None:
    """All that lies there is published, weights before records and the ensemble's own last."""
    scratch = tmp_path / "scratch"
    found = {str(path.relative_to(scratch)) for path in scratch.rglob("*") if path.is_file()}
    assert set(cascade.files) == found
    is_record = [name.endswith(".json") for name in cascade.files]
    assert is_record == sorted(is_record)
    assert sum(is_record) == 4
    assert cascade.files[-1] == "ensemble/ensemble.json"


def test_models_that_do_not_chain_are_refused(tmp_path: Path) -> None:
    """A model trained on whole pictures of 32 px cannot follow a base of 8 px."""
    recipe = recipe_of(f"super_resolution={MODELS}")
    model = recipe.super_resolution["a32"]
    network = model.network.model_copy(update={"cross_attention_px": (16,)})
    whole = model.model_copy(update={"patch_px": 0, "network": network})
    broken = recipe.model_copy(update={"super_resolution": {"a32": whole}})
    with pytest.raises(ValueError, match=r"a32 enlarges 16 px to 32 px .* given pictures of 8 px"):
        assemble(broken, tmp_path)


def test_an_expert_that_was_not_trained_is_never_taken_for_one(tmp_path: Path) -> None:
    """Its file is absent, so that the base must be asked for; then it answers in that interval."""
    outcome = assemble(recipe_of(), tmp_path, "middle")
    directory = tmp_path / "scratch" / "ensemble"
    assert list(outcome.files) == [
        *(f"ensemble/{name}.safetensors" for name in ("base", "high", "low")),
        "ensemble/ensemble.json",
    ]
    assert (outcome.num_in, outcome.facts) == (2, {"stand_ins": ["middle"]})
    intervals = recipe_of().experts.intervals(recipe_of().noise.distribution)
    info = read_ensemble_info(directory)
    assert {one.name: one.interval for one in info.experts} == intervals
    with pytest.raises(SnapshotError, match="middle"):
        load_ensemble(directory)
    with pytest.warns(UserWarning, match="no weights of middle; the base stands in"):
        _, ensemble = load_ensemble(directory, missing="base")
    assert ensemble.stand_ins == ("middle",)


def test_models_that_enlarge_may_lack_experts_too(tmp_path: Path) -> None:
    """Their own parent stands in; every file that is there is published, and no other."""
    outcome = assemble(recipe_of(f"super_resolution={MODELS}"), tmp_path, "high")
    assert outcome.facts == {"stand_ins": ["high", "b16/high"]}
    assert outcome.num_in == 2 + 1 + 1
    scratch = tmp_path / "scratch"
    folder = scratch / "ensemble"
    found = {str(path.relative_to(scratch)) for path in folder.rglob("*") if path.is_file()}
    assert set(outcome.files) == found
    with pytest.warns(UserWarning, match="no weights of high; the base stands in"):
        load_ensemble(read_cascade(folder)[0], missing="base")


def test_what_draws_from_an_ensemble_is_told_of_stand_ins(tmp_path: Path) -> None:
    """`sample` and `evaluate` let the base stand in where assembling did, and only there."""
    whole = manifest(tmp_path / "whole", receipt("ensemble"), stage="assemble")
    facts = {"stand_ins": ["high"]}
    lacking = manifest(tmp_path / "lacking", receipt("ensemble", facts=facts), stage="assemble")
    assert missing_experts(whole) == "error"
    assert missing_experts(lacking) == "base"
