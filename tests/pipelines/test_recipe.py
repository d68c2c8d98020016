"""Tests of pipelines.recipe: what a recipe may say, and how a wrong one is answered."""

from collections.abc import Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path

import pytest

from ediffi.clip_fit import ClipFitConfig
from ediffi.encoding.encoder_weights import EncoderConfig
from ediffi.noise import check_tiling
from pipelines.errors import UserError
from pipelines.recipe import STAGES, ClipFit, Encoder, Recipe, Resources
from pipelines.recipe_file import load_recipe
from pipelines.stage_graph import build_stages

SHIPPED = sorted(
    Path(entry.name).stem for entry in (resources.files("pipelines") / "recipes").iterdir()
)


def refusal(*overrides: str) -> str:
    """What the user reads when the demo recipe is changed so."""
    with pytest.raises(UserError) as caught:
        load_recipe("demo", overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_loads_and_gives_a_graph_in_order(name: str) -> None:
    """Every recipe of the package is valid; each stage comes after those that it needs."""
    recipe = load_recipe(name)
    seen: set[str] = set()
    for stage in build_stages(recipe):
        assert set(stage.needs) <= seen
        assert stage.name.split("/")[0] in STAGES
        seen.add(stage.name)
    check_tiling(recipe.experts.intervals(recipe.noise.distribution))


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("bsae.lr=1", "bsae: unknown field; did you mean 'base'?"),
        ("base.lrr=1", "base.lrr: unknown field; did you mean 'lr'?"),
        ("experts.train.lrr=1", "experts.train.lrr: unknown field; did you mean 'lr'?"),
        ("data.lists=x", "data.lists: unknown field; did you mean 'list'?"),
        ("data.held_out.colunm=x", "data.held_out.colunm: unknown field; did you mean 'column'?"),
        ("encoders.t5.famly=x", "encoders.t5.famly: unknown field; did you mean 'family'?"),
        ("evaluate.features.encodr=x", "evaluate.features.encodr: unknown field; did you mean"),
        ("resources.base.cpu=1", "resources.base.cpu: unknown field; did you mean 'cpus'?"),
        ("noise.zzz=1", "noise.zzz: unknown field; known: log_mean, log_std, sigma_data"),
    ],
)
def test_misspelt_field_is_answered_with_the_likely_one(override: str, answer: str) -> None:
    """A field that does not exist is an error at any depth, also inside unions."""
    assert answer in refusal(override)


def test_misspelt_field_in_a_list_is_answered_with_the_likely_one() -> None:
    """Items of `experts.split` are named by their place, without noise about the other form."""
    message = refusal("experts.split=[{nmae: a, quantiles: [0, 1]}]")
    assert "experts.split.0.nmae: unknown field; did you mean 'name'?" in message
    assert "experts.split.0.name: required, but absent" in message
    assert "paper" not in message


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("network={widths: [8]}", "network.context_width: required, but absent"),
        ("base={lr: 1}", "base.total_images: required, but absent"),
        ("base.lr=fast", "base.lr: Input should be a valid number"),
        ("network.widths=[16, wide]", "network.widths.1: Input should be a valid integer"),
        ("data.image_px=0", "data.image_px: Input should be greater than 0, got 0"),
        ("data.resize=shrink", "data.resize: Input should be 'center_crop', 'pad' or 'stretch'"),
        ("data.source=ftp", "'urls', 'folder', 'shards'"),
        ("base.lr=-1", "base: train.lr must be positive and finite, got -1.0"),
        ("base=3", "base: Input should be a dictionary"),
        ("experts=paper", "experts: Input should be a valid dictionary"),
        ("experts.split=papr", "experts.split: Input should be 'paper' or 'halves', got 'papr'"),
        ("encoders={}", "encoders: Dictionary should have at least 1 item"),
        ("encoders.T5={}", "encoders.T5"),
        ("name=Has Spaces", "name: String should match pattern"),
        ("noise.log_std=.inf", "noise.log_std: Input should be a finite number"),
        ("sample.sigma_max=0.001", "sample: sigma_min must be below sigma_max, got 0.002"),
    ],
)
def test_wrong_value_is_named_with_what_was_required(override: str, answer: str) -> None:
    """A missing field, a wrong type and a value out of range all name the field."""
    assert answer in refusal(override)


def test_all_broken_fields_are_named_at_once() -> None:
    """Nobody has to mend a recipe one error at a time."""
    message = refusal("base.lrr=1", "seed=x", "data.image_px=0")
    assert [word in message for word in ("base.lrr", "seed", "data.image_px")] == [True] * 3


def interval(name: str, **edges: Sequence[float]) -> str:
    kind, (low, high) = next(iter(edges.items()))
    return f"{{name: {name}, {kind}: [{low}, {high}]}}"


@pytest.mark.parametrize(
    ("low", "high", "problem"),
    [
        ((0, 0.5), (0.7, ".inf"), "gap [0.5, 0.7)"),
        ((0, 0.7), (0.5, ".inf"), "overlap [0.5, 0.7)"),
    ],
)
def test_experts_must_tile_the_noise_axis(low: tuple, high: tuple, problem: str) -> None:
    """A gap or an overlap names both experts and the range of sigma."""
    split = f"[{interval('calm', sigma=low)}, {interval('wild', sigma=high)}]"
    message = refusal(f"experts.split={split}")
    assert problem in message
    assert "'calm'" in message
    assert "'wild'" in message


def test_experts_must_have_names_of_their_own() -> None:
    """Two intervals of one name would write to one place."""
    split = f"[{interval('a', quantiles=(0, 0.5))}, {interval('a', quantiles=(0.5, 1))}]"
    assert "two intervals are named 'a'" in refusal(f"experts.split={split}")


def test_interval_has_one_kind_of_edges() -> None:
    """Quantiles and sigma together, or neither, leave open what was meant."""
    both = "[{name: a, quantiles: [0, 1], sigma: [0, .inf]}]"
    assert "interval 'a': give either `quantiles` or `sigma`" in refusal(f"experts.split={both}")
    assert "give either" in refusal("experts.split=[{name: a}]")


def test_split_by_quantiles_halves_the_probability() -> None:
    """Edges by quantile are those of the recipe's own noise distribution."""
    split = f"[{interval('a', quantiles=(0, 0.5))}, {interval('b', quantiles=(0.5, 1))}]"
    recipe = load_recipe("demo", [f"experts.split={split}"])
    distribution = recipe.noise.distribution
    masses = [one.mass(distribution) for one in recipe.experts.intervals(distribution).values()]
    assert masses == pytest.approx([0.5, 0.5])


def test_resources_of_an_unknown_stage_are_refused() -> None:
    """A misspelt stage would silently get the defaults."""
    assert "resources: no stage 'train'; stages: ingest, clip_fit" in refusal(
        "resources.train.cpus=1"
    )


def test_resources_of_a_kind_serve_all_its_stages() -> None:
    """`embed` speaks for every encoder's stage; what is not said takes the defaults."""
    recipe = load_recipe("demo", ["resources.embed.cpus=2"])
    assert recipe.resources_of("embed/t5") == Resources(cpus=2)
    assert recipe.resources_of("assemble") == Resources()


def test_fitted_weights_need_something_that_fits_them() -> None:
    """Without a `clip_fit` section nobody makes the weights named `fitted`."""
    message = refusal("clip_fit=null")
    assert "encoders.clip_text.weights is 'fitted', which needs a `clip_fit:` section" in message


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (
            ["evaluate.features.encoder=clip_text"],
            "evaluate.features.encoder: must name an encoder of family open_clip_image, "
            "got 'clip_text'; the recipe has: clip_image",
        ),
        (
            ["evaluate.alignment=clip", "evaluate.text_encoder=t5"],
            "evaluate.text_encoder: must name an encoder of family open_clip_text",
        ),
        (
            ["evaluate.alignment=clip", "encoders.clip_image.weights=openai"],
            "needs an encoder of family open_clip_image with the weights of 'clip_text'",
        ),
    ],
)
def test_evaluation_names_encoders_that_fit(overrides: list[str], answer: str) -> None:
    """What evaluation would miss after hours of training is missed at once."""
    assert answer in refusal(*overrides)


def test_the_seed_reaches_every_training_run() -> None:
    """One seed in the recipe seeds base and experts; one that says its own keeps it."""
    recipe = load_recipe("demo", ["seed=7", "experts.train.seed=9"])
    assert (recipe.base.seed, recipe.experts.train.seed) == (7, 9)
    assert load_recipe("demo", ["seed=7"]).experts.train.seed == 7


def test_a_recipe_survives_json() -> None:
    """The record of a run gives back the recipe, an infinite sigma too."""
    split = f"[{interval('a', sigma=(0, 0.5))}, {interval('b', sigma=(0.5, '.inf'))}]"
    for recipe in (load_recipe("demo"), load_recipe("demo", [f"experts.split={split}"])):
        assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert recipe.model_dump(mode="json")["experts"]["split"][1]["sigma"] == [0.5, "inf"]


def test_encoder_section_mirrors_the_library() -> None:
    """Every field of the library's config can be said, with equal defaults; three are ours."""
    ours = {name: field.default for name, field in Encoder.model_fields.items()}
    theirs = {field.name: field.default for field in fields(EncoderConfig)}
    assert ours.keys() - theirs.keys() == {"cache", "dropout", "max_rejects_fraction"}
    assert theirs.keys() <= ours.keys()
    optional = theirs.keys() - {"family", "weights"}
    assert {name: ours[name] for name in optional} == {name: theirs[name] for name in optional}


def test_clip_fit_section_names_only_what_the_library_knows() -> None:
    """Whatever the section says is passed on whole, so it may say nothing else."""
    assert set(ClipFit.model_fields) <= {field.name for field in fields(ClipFitConfig)}


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("resources.base.custom={CPU: 2}", "'CPU' is no custom resource: use cpus, gpus or memory"),
        ("resources.base.timeout_s=never", "resources.base.timeout_s"),
        ("resources.base.node_group='a b'", "resources.base.node_group: String should match"),
        ("resources.base.placement=near", "'pack', 'spread', 'strict_pack' or 'strict_spread'"),
        ("resources.base.backoff_s=-1", "resources.base.backoff_s: Input should be greater"),
    ],
)
def test_resources_that_make_no_sense_are_refused(override: str, answer: str) -> None:
    """Each field says what it may be."""
    assert answer in refusal(override)


def test_resources_enter_no_fingerprint() -> None:
    """Work that is done stays done, whatever it took and however stubbornly it was tried."""
    words = "{timeout_s: 5, backoff_s: 9, node_group: gpu, placement: spread, memory_gib: 1}"
    changed = load_recipe("demo", [f"resources.base={words}", f"resources.experts={words}"])
    for ours, theirs in zip(build_stages(load_recipe("demo")), build_stages(changed), strict=True):
        if ours.name in ("base", "experts"):
            assert ours.identity() == theirs.identity()
