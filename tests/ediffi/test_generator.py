"""Tests of ediffi.generator: from prompts, references and paintings to pictures of every size."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import ediffi
from ediffi.cascade import PAPER_ENLARGING, enlarge
from ediffi.ensemble_file import load_ensemble
from ediffi.generator import Generator
from ediffi.painting import Painting, Phrase
from ediffi.residency import Residency
from ediffi.sampling import SamplingConfig, draw, to_uint8
from ediffi.snapshot import SnapshotError
from tests.tiny_generator import write_generator

FAST = SamplingConfig(sampler="dpm++2m", num_steps=3)
FEW = replace(PAPER_ENLARGING, num_steps=2)
PROMPTS = ["a red circle", "a blue square and a red circle", "a blue circle"]
LEFT_HW = torch.cat([torch.ones(8, 4), torch.zeros(8, 4)], dim=1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble with all of the paper's streams and a cascade 8 -> 16 -> 32."""
    path = tmp_path_factory.mktemp("all") / "ensemble"
    streams = ("t5", "clip_text", "clip_image")
    return write_generator(path, streams=streams, sizes_px=(16, 32))


@pytest.fixture(scope="module")
def generator(directory: Path) -> Generator:
    """That ensemble, loaded."""
    return ediffi.load(directory)


@pytest.fixture(scope="module")
def unheard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble without any stream or cascade."""
    return write_generator(tmp_path_factory.mktemp("none") / "ensemble", streams=())


def reference(colour: str) -> Image.Image:
    """A picture to take the style of."""
    return Image.new("RGB", (12, 9), colour)


def test_pictures_are_pil_and_equal_what_draw_gives(generator: Generator) -> None:
    """`generate` only wraps: pixel by pixel its pictures are those of `draw`, as RGB."""
    pictures = generator.generate(PROMPTS, config=FAST, enlarging=FEW)
    drawn_BCHW = generator.draw(PROMPTS, seeds=[0, 1, 2], config=FAST, enlarging=FEW)
    assert [(one.mode, one.size) for one in pictures] == [("RGB", (32, 32))] * 3
    assert drawn_BCHW.dtype == torch.uint8
    for picture, drawn_CHW in zip(pictures, drawn_BCHW, strict=True):
        assert np.array_equal(np.asarray(picture), drawn_CHW.permute(1, 2, 0).numpy())


def test_base_draws_what_sampling_draws_from_the_conditioning(generator: Generator) -> None:
    """Encoding and sampling by hand give the same bits: nothing else happens on the way."""
    conditioning = generator.conditioning(PROMPTS).to(dtype=torch.float32)
    by_hand = draw(
        generator.ensemble, conditioning, seeds=[4, 5, 6], shape_CHW=(3, 8, 8), config=FAST
    )
    drawn = generator.draw(PROMPTS, seeds=[4, 5, 6], config=FAST, image_px=8)
    assert torch.equal(drawn, to_uint8(by_hand))


def test_pictures_do_not_depend_on_their_batch(generator: Generator) -> None:
    """Alone, in another order, or cut into batches at every stage: within one grey level."""
    together = generator.draw(PROMPTS, seeds=[7, 8, 9], config=FAST, enlarging=FEW)
    one_by_one = generator.draw(
        PROMPTS,
        seeds=[7, 8, 9],
        config=replace(FAST, batch_pictures=1),
        enlarging=replace(FEW, batch_pictures=1),
    )
    pair = generator.draw([PROMPTS[2], PROMPTS[0]], seeds=[9, 7], config=FAST, enlarging=FEW)
    for other in (one_by_one, torch.stack([pair[1], one_by_one[1], pair[0]])):
        assert (together.int() - other.int()).abs().max() <= 1


def test_a_single_prompt_is_drawn_with_every_seed(generator: Generator) -> None:
    """One text and three seeds are three pictures; seeds count from 0 where none are given."""
    three = generator.draw(PROMPTS[0], seeds=[0, 1, 2], config=FAST, image_px=8)
    assert torch.equal(three, generator.draw([PROMPTS[0]] * 3, config=FAST, image_px=8))
    assert not torch.equal(three[0], three[1])
    assert generator.draw(PROMPTS[0], config=FAST, image_px=8).shape == (1, 3, 8, 8)


def test_guidance_stands_in_for_that_of_the_config(generator: Generator) -> None:
    """The argument and the config's field are the same thing, for the base alone."""
    given = generator.draw_sizes(PROMPTS, guidance=4.0, config=FAST, enlarging=FEW)
    config = replace(FAST, guidance=4.0)
    assert torch.equal(given[32], generator.draw(PROMPTS, config=config, enlarging=FEW)), (
        "enlarging keeps its own guidance"
    )
    assert not torch.equal(given[8], generator.draw(PROMPTS, config=FAST, image_px=8))


def test_a_reference_is_the_image_stream_of_its_own_encoder(
    generator: Generator, tmp_path: Path
) -> None:
    """The pooled vector is what a cache of that picture would hold; without one it is zero."""
    from ediffi.encoders import load_encoder
    from ediffi.encoding.encoder_weights import EncoderConfig

    red, blue = reference("red"), reference("blue")
    blue.save(tmp_path / "blue.png")
    styles = [red, None, tmp_path / "blue.png"]
    found = generator.conditioning(PROMPTS, style=styles).streams["clip_image"].pooled_BD
    description = generator.info.encoders["clip_image"]
    weights = str(generator.directory / description["weights"])
    encoder = load_encoder(EncoderConfig(**{**description, "weights": weights}))
    vectors = [one["pooled"] for one in encoder.encode([red, blue])]
    assert found is not None
    assert torch.equal(found, torch.stack([vectors[0], torch.zeros_like(vectors[0]), vectors[1]]))
    assert not torch.equal(vectors[0], vectors[1])


def test_a_reference_changes_the_picture_of_its_prompt_alone(generator: Generator) -> None:
    """Two prompts, one with a reference: the other's picture stays; one reference serves all."""
    seeds = [0, 1]
    plain = generator.draw(PROMPTS[:2], seeds=seeds, config=FAST, image_px=8)
    one = generator.draw(
        PROMPTS[:2], seeds=seeds, config=FAST, image_px=8, style=[reference("red"), None]
    )
    both = generator.draw(PROMPTS[:2], seeds=seeds, config=FAST, image_px=8, style=reference("red"))
    assert (one[1].int() - plain[1].int()).abs().max() <= 1
    assert not torch.equal(one[0], plain[0])
    assert (both[0].int() - one[0].int()).abs().max() <= 1
    assert not torch.equal(both[1], plain[1])


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "L"])
def test_references_of_every_kind_become_rgb(generator: Generator, mode: str) -> None:
    """Palettes, grey and print colours say what they look like, and glass is on white."""
    if mode == "RGBA":
        given, meant = Image.new("RGBA", (8, 8), (255, 0, 0, 0)), reference("white")
    else:
        given, meant = reference("white").convert(mode), reference("white")
    found, expected = (
        generator.conditioning(PROMPTS[:1], style=one).streams["clip_image"].pooled_BD
        for one in (given, meant.resize((8, 8)))
    )
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found, expected)


def test_unfit_references_are_refused(generator: Generator, unheard: Path, tmp_path: Path) -> None:
    """No picture, no image stream, or not one a prompt: the message says which."""
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"style must be a picture, but .*text\.png is none"):
        generator.generate(PROMPTS[0], style=tmp_path / "text.png")
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        generator.generate(PROMPTS[0], style=str(tmp_path / "absent.png"))
    with pytest.raises(ValueError, match=r"style must be one for all or one a prompt \(3\), got 2"):
        generator.generate(PROMPTS, style=[reference("red"), None])
    with pytest.raises(ValueError, match="has no image stream"):
        ediffi.load(unheard).generate("anything", style=reference("red"))


def test_painting_steers_and_strength_zero_does_not(generator: Generator) -> None:
    """At strength 0 the bits are those of no painting; at a great one they are others."""

    def drawn(strength: float) -> Tensor:
        painting = Painting((Phrase("red circle", LEFT_HW, strength),))
        paintings = [painting, None]
        return generator.draw(PROMPTS[:2], config=FAST, image_px=8, painting=paintings)

    plain = generator.draw(PROMPTS[:2], config=FAST, image_px=8)
    assert torch.equal(drawn(0.0), plain)
    assert not torch.equal(drawn(10.0)[0], plain[0])
    assert (drawn(10.0)[1].int() - plain[1].int()).abs().max() <= 1


def test_a_painted_phrase_must_be_in_its_prompt(generator: Generator) -> None:
    """The message names the phrase."""
    painting = Painting((Phrase("green triangle", LEFT_HW),))
    with pytest.raises(ValueError, match="green triangle"):
        generator.generate(PROMPTS[0], painting=painting)


def test_the_cascade_enlarges_stage_by_stage(generator: Generator) -> None:
    """Each size is what `enlarge` makes of the one before, unpainted, with its own stage."""
    painting = Painting((Phrase("red circle", LEFT_HW, 10.0),))
    sizes = generator.draw_sizes(
        PROMPTS[0], seeds=[3], config=FAST, enlarging=FEW, painting=painting
    )
    assert generator.sizes_px == tuple(sizes) == (8, 16, 32)
    conditioning = generator.conditioning(PROMPTS[:1], painting=painting).to(dtype=torch.float32)
    pictures = draw(generator.ensemble, conditioning, seeds=[3], shape_CHW=(3, 8, 8), config=FAST)
    assert torch.equal(sizes[8], to_uint8(pictures))
    unpainted = generator.conditioning(PROMPTS[:1]).to(dtype=torch.float32)
    for stage, enlarger in enumerate(generator.enlargers, start=1):
        info, ensemble = load_ensemble(enlarger.directory)
        options = {"seeds": [3], "stage": stage, "config": FEW}
        pictures = enlarge(ensemble, info.network, pictures, unpainted, **options)
        assert torch.equal(sizes[enlarger.image_px], to_uint8(pictures))


def test_pictures_stop_at_the_size_that_is_asked_for(generator: Generator) -> None:
    """Smaller sizes are those on the way to the largest; others are refused with the list."""
    sizes = generator.draw_sizes(PROMPTS[0], config=FAST, enlarging=FEW)
    for image_px in (8, 16, 32):
        drawn = generator.draw(PROMPTS[0], config=FAST, enlarging=FEW, image_px=image_px)
        assert torch.equal(drawn, sizes[image_px])
    with pytest.raises(ValueError, match="8, 16, 32; got 64"):
        generator.draw(PROMPTS[0], image_px=64)


def test_each_model_of_the_cascade_may_sample_in_its_own_way(generator: Generator) -> None:
    """By name; the paper's way where nothing is said; names that are not there are refused."""
    default = generator.draw_sizes(PROMPTS[0], config=FAST)
    told = generator.draw_sizes(PROMPTS[0], config=FAST, enlarging={"sr32": FEW})
    assert torch.equal(told[16], default[16])
    assert not torch.equal(told[32], default[32])
    everywhere = generator.draw(PROMPTS[0], config=FAST, enlarging=PAPER_ENLARGING)
    assert torch.equal(everywhere, default[32])
    with pytest.raises(ValueError, match=r"enlarging names sr64, but .* sr16, sr32"):
        generator.draw(PROMPTS[0], enlarging={"sr64": FEW})


def test_dropped_streams_are_not_heard(generator: Generator) -> None:
    """Without its text streams a prompt says nothing, at any size; without one of them, less."""
    texts = ["t5", "clip_text"]
    deaf = generator.draw(
        PROMPTS, seeds=[0, 0, 0], config=FAST, enlarging=FEW, dropped_streams=texts
    )
    assert (deaf - deaf[:1]).eq(0).all()
    half = generator.draw(PROMPTS[0], config=FAST, image_px=8, dropped_streams=["t5"])
    assert not torch.equal(half, generator.draw(PROMPTS[0], config=FAST, image_px=8))
    with pytest.raises(ValueError, match="cannot drop sound: the streams are t5"):
        generator.draw(PROMPTS[0], dropped_streams=["sound"])


def test_the_base_draws_on_request(generator: Generator) -> None:
    """The experts' ancestor draws another picture; a third kind of model is refused."""
    base = generator.draw(PROMPTS[0], config=FAST, image_px=8, model="base")
    assert not torch.equal(base, generator.draw(PROMPTS[0], config=FAST, image_px=8))
    with pytest.raises(ValueError, match="model must be one of ensemble, base, got 'expert'"):
        generator.draw(PROMPTS[0], model="expert")  # type: ignore[arg-type]


def test_bf16_is_near_and_not_the_same(generator: Generator, directory: Path) -> None:
    """Autocast is really on, and changes what rounding changes."""
    half = ediffi.load(directory, precision="bf16")
    x_BCHW, sigma_B = torch.randn(3, 3, 8, 8), torch.full((3,), 2.0)
    conditioning = generator.conditioning(PROMPTS).to(dtype=torch.float32)
    with torch.no_grad():
        rough = half.denoiser()(x_BCHW, sigma_B, conditioning)
        exact = generator.denoiser()(x_BCHW, sigma_B, conditioning)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, atol=0.1, rtol=0.1)
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, got 'fp16'"):
        ediffi.load(directory, precision="fp16")  # type: ignore[arg-type]


def test_lazy_experts_draw_the_same_bits(generator: Generator, directory: Path) -> None:
    """Residency decides when weights are read, never what they draw."""
    lazy = ediffi.load(directory, residency=Residency(load="lazy"))
    options = {"config": FAST, "enlarging": FEW}
    assert torch.equal(lazy.draw(PROMPTS, **options), generator.draw(PROMPTS, **options))


def test_a_missing_expert_is_an_error_or_the_base(directory: Path, tmp_path: Path) -> None:
    """By setting; the ensemble names who is stood in for."""
    copy = tmp_path / "ensemble"
    shutil.copytree(directory, copy)
    (copy / "high.safetensors").unlink()
    with pytest.raises(SnapshotError, match=r"high\.safetensors"):
        ediffi.load(copy)
    with pytest.warns(UserWarning, match="high"):
        generator = ediffi.load(copy, missing_experts="base")
    assert generator.ensemble.stand_ins == ("high",)
    assert generator.draw(PROMPTS[0], config=FAST, image_px=8).shape == (1, 3, 8, 8)


def test_progress_counts_finished_pictures(generator: Generator) -> None:
    """After every batch of the base, what is drawn to its last size."""
    told: list[int] = []
    config = replace(FAST, batch_pictures=2)
    generator.generate(PROMPTS, config=config, image_px=8, progress=told.append)
    assert told == [2, 3]


@pytest.mark.parametrize(
    ("prompts", "seeds", "message"),
    [
        (["a", "b"], [1], r"seeds must be one a prompt \(2\), got 1"),
        ([], None, "prompts must be at least one"),
        ("a", [], "prompts must be at least one"),
        (["a"], [-1], "seed"),
    ],
)
def test_numbers_that_do_not_match_are_refused(
    generator: Generator, prompts: list[str], seeds: list[int] | None, message: str
) -> None:
    """Before anything is drawn."""
    with pytest.raises(ValueError, match=message):
        generator.generate(prompts, seeds=seeds)


def test_an_ensemble_without_streams_draws_too(unheard: Path) -> None:
    """Unconditional: prompts only say how many; no encoder is needed."""
    generator = ediffi.load(str(unheard))
    assert generator.sizes_px == (8,)
    pictures = generator.generate(["one", "two"], seeds=[1, 1], config=FAST)
    assert pictures[0].tobytes() == pictures[1].tobytes()
