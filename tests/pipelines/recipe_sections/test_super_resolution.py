"""Tests of recipe_sections.super_resolution: what the section may say, and the sizes it needs."""

import math
from typing import Any

import pytest

from ediffi.degradation import DegradationConfig
from pipelines.errors import UserError
from pipelines.recipe import Recipe
from pipelines.recipe_file import load_recipe
from pipelines.recipe_sections.super_resolution import by_size, check_cascade
from pipelines.stage import Stage
from pipelines.stage_graph import build_stages

MODEL = """{sr32: {
    image_px: 32, low_res_px: 16,
    network: {widths: [32, 64], num_blocks: [1, 2], cross_attention_px: [8],
              context_width: 64, embedding_width: 128},
    train: {total_images: 64, batch_images: 8, ema_half_life_images: 8, checkpoint_images: 32,
            log_images: 32}}}"""
SIZES = ("data.image_px=32", "network.image_px=16")
TRAIN = """{total_images: 32, batch_images: 8, ema_half_life_images: 8, checkpoint_images: 32,
            log_images: 32}"""
EXPERTS = f"super_resolution.sr32.experts={{train: {TRAIN}}}"


def recipe(*overrides: str) -> Recipe:
    """The demo, its base at 16 px, with one super-resolution model to 32 px."""
    return load_recipe("demo", (*SIZES, f"super_resolution={MODEL}", *overrides))


def stage_of(made: Recipe, name: str = "super_resolution/sr32") -> Stage:
    """One stage of the recipe."""
    return next(stage for stage in build_stages(made) if stage.name == name)


def refusal(*overrides: str) -> str:
    """What the user reads when that recipe is changed so."""
    with pytest.raises(UserError) as caught:
        recipe(*overrides)
    return str(caught.value)


def test_a_model_is_a_stage_of_its_own() -> None:
    """It needs pictures and embeddings only, and takes the resources of its kind."""
    made = recipe("resources.super_resolution={gpus: 1}")
    stage = stage_of(made)
    assert set(stage.needs) == {"ingest", "embed/t5", "embed/clip_text", "embed/clip_image"}
    assert made.resources_of(stage.name).gpus == 1
    assert made.super_resolution["sr32"].factor == 2
    assert made.super_resolution["sr32"].degradation == DegradationConfig()


def test_the_base_may_see_smaller_pictures_than_are_stored() -> None:
    """`network.image_px` is the base's size; without it, it is what is stored."""
    assert recipe().base_px == 16
    assert load_recipe("demo", SIZES[:1]).base_px == 32


def test_a_network_that_names_no_size_is_written_as_before() -> None:
    """So that it keeps its fingerprint; a size that is named is written and read back."""
    plain, sized = load_recipe("demo").network, recipe().network
    assert "image_px" not in plain.model_dump(mode="json")
    assert sized.model_dump(mode="json")["image_px"] == 16
    assert type(sized).model_validate(sized.model_dump(mode="json")) == sized


def test_the_network_becomes_the_librarys_own_config() -> None:
    """Sizes of the recipe and the streams of the caches."""
    from ediffi.conditioning import StreamConfig

    streams = (StreamConfig(name="t5", token_width=4),)
    config = recipe().network.config(16, streams)
    assert (config.image_px, config.widths, config.streams) == (16, (48, 64), streams)
    enlarging = recipe().super_resolution["sr32"].network_config(streams)
    assert (enlarging.image_px, enlarging.low_res_factor) == (32, 2)
    assert (enlarging.widths, enlarging.streams) == ((32, 64), streams)


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("data.image_px=16", "super_resolution.sr32.image_px: must be at most data.image_px"),
        ("network.image_px=64", "network.image_px: must be at most data.image_px"),
        ("super_resolution.sr32.low_res_px=12", "image_px must be two or more times low_res_px"),
        ("super_resolution.sr32.low_res_px=32", "image_px must be two or more times low_res_px"),
        ("super_resolution.sr32.patch_px=64", "patch_px must be at most image_px (32), got 64"),
        ("super_resolution.sr32.patch_px=18", "patch_px must be divisible by 2 (image_px / low"),
        ("super_resolution.sr32.network.num_blocks=[1]", "one number for each of the 2 widths"),
        (
            "super_resolution.sr32.network.cross_attention_px=[32]",
            "network.cross_attention_px must be resolutions of the network's levels, 16, 8; got 32",
        ),
        (
            "super_resolution.sr32.train.batch_images=9",
            "batch_images must be a multiple of the 2 ranks",
        ),
        (
            "super_resolution.sr32.degradation.kind=blur",
            "kind: Input should be 'none' or 'real_esrgan'",
        ),
        ("super_resolution.sr32.degradation.knd=none", "degradation.knd: unknown field"),
        ("super_resolution.sr32.network.enlarging=nearest", "'bilinear' or 'bicubic'"),
        ("super_resolution.sr32.imagepx=3", "sr32.imagepx: unknown field; did you mean 'image_px'"),
    ],
)
def test_what_does_not_fit_is_explained(override: str, answer: str) -> None:
    """Each wrong size names the field, what was required and what was found."""
    more = ("resources.super_resolution={num_workers: 2}",) if "batch" in override else ()
    assert answer in refusal(override, *more)


def test_self_attention_is_refused_for_training_on_patches() -> None:
    """A network trained on patches must be fully convolutional to enlarge whole pictures."""
    model = "super_resolution.sr32"
    answer = refusal(
        f"{model}.patch_px=16",
        f"{model}.network.self_attention_px=[8]",
        f"{model}.network.cross_attention_px=[4]",
    )
    assert "self_attention_px must be empty for training on patches, got 8" in answer


@pytest.mark.parametrize(
    "change",
    [
        "image_px=64",
        "low_res_px=8",
        "patch_px=16",
        "degradation.kind=none",
        "degradation.final_sinc_probability=0.5",
        "network.widths=[32, 96]",
        "network.enlarging=bilinear",
        "train.lr=0.5",
    ],
)
def test_whatever_decides_the_outcome_is_in_the_identity(change: str) -> None:
    """Any such change gives the stage another identity; how often it writes does not."""
    name, cross = "super_resolution.sr32", {"image_px=64": "16", "patch_px=16": "4"}.get(change)
    more = (f"{name}.network.cross_attention_px=[{cross}]",) if cross else ()
    more += ("network.image_px=8",) if change == "low_res_px=8" else ()

    def identity(*overrides: str) -> Any:
        return stage_of(recipe("data.image_px=64", *overrides)).identity()

    assert identity(f"{name}.{change}", *more) != identity()
    assert identity(f"{name}.train.log_images=8") == identity()


def test_shipped_recipes_hold_the_papers_models(demo_recipe: Recipe) -> None:
    """SR256 and SR1024: factors, patches, iterations; recipes without the section have no stage."""
    models = load_recipe("ediffi-1024px").super_resolution
    assert (models["sr256"].factor, models["sr1024"].factor) == (4, 4)
    assert (models["sr256"].network_px, models["sr1024"].network_px) == (256, 256)
    iterations = [one.train.final_images / 2048 for one in models.values()]
    assert iterations == [2_000_000, 1_700_000]
    names = [stage.name for stage in build_stages(demo_recipe)]
    assert not any(name.startswith("super") for name in names)


def test_the_cascades_base_is_that_of_the_64_px_recipe() -> None:
    """ediffi-1024px differs from ediffi-64px in its pictures and its enlarging models alone."""
    small, cascade = (load_recipe(name) for name in ("ediffi-64px", "ediffi-1024px"))
    assert cascade.base_px == small.base_px
    for section in ("noise", "base", "experts", "evaluate", "encoders"):
        assert getattr(cascade, section) == getattr(small, section), section
    for field in type(small.sample).model_fields.keys() - {"enlarging"}:
        assert getattr(cascade.sample, field) == getattr(small.sample, field), field


def test_shipped_recipes_draw_as_the_paper() -> None:
    """DEIS: 25 steps of exponent 6 for the base, 10 of exponent 3 for what enlarges."""
    sample = load_recipe("ediffi-1024px").sample
    assert (sample.sampler, sample.num_steps, sample.rho) == ("deis", 25, 6)
    larger = sample.enlarging
    assert (larger.sampler, larger.num_steps, larger.rho) == ("deis", 10, 3)


# -- experts of a super-resolution model ----------------------------------------------------------


def test_shipped_experts_are_the_papers() -> None:
    """SR256 has two, which meet at the median; SR1024 has none."""
    cascade = load_recipe("ediffi-1024px")
    models, distribution = cascade.super_resolution, cascade.noise.distribution
    experts = models["sr256"].experts
    assert experts is not None
    median = math.exp(cascade.noise.log_mean)
    intervals = experts.intervals(distribution)
    assert list(intervals) == ["low", "high"]
    assert intervals["low"].sigma_max == intervals["high"].sigma_min == pytest.approx(median)
    assert models["sr1024"].experts is None


def test_experts_are_a_stage_after_their_model_and_before_assembling() -> None:
    """With resources of their own; without the section there is no such stage."""
    made = recipe(EXPERTS, "resources.super_resolution_experts={num_workers: 4}")
    names = [stage.name for stage in build_stages(made)]
    order = ["super_resolution/sr32", "super_resolution_experts/sr32", "assemble"]
    assert [name for name in names if name in order] == order
    stage = stage_of(made, "super_resolution_experts/sr32")
    assert stage.needs[0] == "super_resolution/sr32"
    assert made.resources_of(stage.name).num_workers == 4
    assert order[1] not in [stage.name for stage in build_stages(recipe())]


def test_experts_leave_the_fingerprint_of_their_model_alone() -> None:
    """Unless they carry on more of it than its averaged weights."""
    plain, start = stage_of(recipe()).identity(), "super_resolution.sr32.experts.start_weights"
    assert stage_of(recipe(EXPERTS)).identity() == plain
    assert stage_of(recipe(EXPERTS, f"{start}=raw")).identity() == {**plain, "keeps_state": True}


@pytest.mark.parametrize(
    "change", ["split=paper", "start_optimizer=inherit", "growth=levels", "train.lr=0.5"]
)
def test_what_decides_the_experts_is_in_their_identity(change: str) -> None:
    """The same settings as of the base's experts; growth counts where a node lies above."""
    name, own = "super_resolution_experts/sr32", "super_resolution.sr32.experts"
    quarters = "[{name: a, quantiles: [0, 0.25]}, {name: b, quantiles: [0.25, 1]}]"
    split = (f"{own}.split={quarters}",) if "growth" in change else ()
    plain = stage_of(recipe(EXPERTS, *split), name).identity()
    assert stage_of(recipe(EXPERTS, *split, f"{own}.{change}"), name).identity() != plain
    assert stage_of(recipe(EXPERTS, *split, f"{own}.train.log_images=8"), name).identity() == plain


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        (
            "experts.split=[{name: a, quantiles: [0, 0.4]}, {name: b, quantiles: [0.5, 1]}]",
            "super_resolution.sr32: the experts do not tile [0, inf): gap",
        ),
        (
            "experts.split=[{name: a, quantils: [0, 1]}]",
            "super_resolution.sr32.experts.split.0.quantils: unknown field; did you mean",
        ),
        ("low_res_px=8", "super_resolution.sr32.low_res_px must be 16, the size of what the base"),
        ("experts.train.batch_images=9", "batch_images must be a multiple of the 2 ranks"),
        (
            "experts.train.ema_profile=power",
            "super_resolution.sr32: experts.start_ema 'inherit' of low, low needs ema_profile "
            "'power' of its parent sr32 too, got 'half_life'",
        ),
    ],
)
def test_experts_that_cannot_be_trained_are_refused(override: str, answer: str) -> None:
    """Before anything starts, and with the name of their model."""
    more = ["resources.super_resolution_experts={num_workers: 2}"]
    more += ["super_resolution.sr32.experts.start_ema=inherit"] if "ema" in override else []
    assert answer in refusal(EXPERTS, f"super_resolution.sr32.{override}", *more)


def test_experts_take_the_seed_of_the_recipe() -> None:
    """As every training run that names none of its own."""
    experts = recipe(EXPERTS, "seed=7").super_resolution["sr32"].experts
    assert experts is not None
    assert experts.train.seed == 7
    own = recipe(EXPERTS, "seed=7", "super_resolution.sr32.experts.train.seed=3")
    experts = own.super_resolution["sr32"].experts
    assert experts is not None
    assert experts.train.seed == 3


def test_models_must_chain_from_the_base() -> None:
    """Each enlarges what the one before draws, whatever their order in the recipe."""
    models = load_recipe("ediffi-1024px").super_resolution
    backwards = dict(reversed(models.items()))
    assert list(by_size(backwards)) == ["sr256", "sr1024"]
    check_cascade(backwards, 64)
    with pytest.raises(ValueError, match=r"sr256.low_res_px must be 32, .* the base draws, got 64"):
        check_cascade(backwards, 32)
    with pytest.raises(ValueError, match=r"sr1024.low_res_px must be 64, .* the base draws"):
        check_cascade({"sr1024": models["sr1024"]}, 64)
