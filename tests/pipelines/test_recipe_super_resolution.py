"""Tests of pipelines.recipe_super_resolution: what the section may say, and the sizes it needs."""

from typing import Any

import pytest

from ediffi.degradation import DegradationConfig
from pipelines.errors import UserError
from pipelines.recipe import Recipe
from pipelines.recipe_file import load_recipe
from pipelines.stages import build_stages

MODEL = """{sr32: {
    image_px: 32, low_res_px: 16,
    network: {widths: [32, 64], num_blocks: [1, 2], cross_attention_px: [8],
              context_width: 64, embedding_width: 128},
    train: {total_images: 64, batch_images: 8, ema_half_life_images: 8, checkpoint_images: 32,
            log_images: 32}}}"""
STORED = "data.image_px=32"


def recipe(*overrides: str) -> Recipe:
    """The demo with pictures stored at 32 px and one super-resolution model."""
    return load_recipe("demo", (STORED, f"super_resolution={MODEL}", *overrides))


def refusal(*overrides: str) -> str:
    """What the user reads when that recipe is changed so."""
    with pytest.raises(UserError) as caught:
        recipe(*overrides)
    return str(caught.value)


def test_a_model_is_a_stage_of_its_own() -> None:
    """It needs pictures and embeddings only, and takes the resources of its kind."""
    made = recipe("network.image_px=16", "resources.super_resolution={gpus: 1}")
    stage = build_stages(made)[-1]
    assert stage.name == "super_resolution/sr32"
    assert set(stage.needs) == {"ingest", "embed/t5", "embed/clip_text", "embed/clip_image"}
    assert made.resources_of(stage.name).gpus == 1
    assert made.super_resolution["sr32"].factor == 2
    assert made.super_resolution["sr32"].degradation == DegradationConfig()


def test_the_base_may_see_smaller_pictures_than_are_stored() -> None:
    """`network.image_px` is the base's size; without it, it is what is stored."""
    assert recipe("network.image_px=16").base_px == 16
    assert recipe().base_px == 32


def test_a_network_that_names_no_size_is_written_as_before() -> None:
    """So that it keeps its fingerprint; a size that is named is written and read back."""
    plain, sized = recipe().network, recipe("network.image_px=16").network
    assert "image_px" not in plain.model_dump(mode="json")
    assert sized.model_dump(mode="json")["image_px"] == 16
    assert type(sized).model_validate(sized.model_dump(mode="json")) == sized


def test_the_network_becomes_the_librarys_own_config() -> None:
    """Sizes of the recipe and the streams of the caches."""
    from ediffi.conditioning import StreamConfig

    streams = (StreamConfig(name="t5", token_width=4),)
    config = recipe("network.image_px=16").network.config(16, streams)
    assert (config.image_px, config.widths, config.streams) == (16, (48, 64), streams)


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

    def identity(*overrides: str) -> Any:
        return build_stages(recipe("data.image_px=64", *overrides))[-1].identity()

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
    for section in ("noise", "base", "experts", "sample", "evaluate", "encoders"):
        assert getattr(cascade, section) == getattr(small, section), section
