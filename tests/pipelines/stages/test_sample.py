"""Tests of pipelines.stages.sample: which pictures are drawn, and which grids people get to see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ediffi
from ediffi.pictures import decode_image
from ediffi.shards import ShardWriter, caption_of, picture_of, read_shard
from pipelines.errors import UserError
from pipelines.grids import GAP_PX, TEXT_PX, tile_px
from pipelines.recipe_sections.sampling import Sampling
from pipelines.stage import File, Manifest, Outcome, Unit, Workspace
from pipelines.stages.sample import Sample, held_out_receipts
from tests.pipelines.fake_stages import manifest, receipt
from tests.tiny_generator import write_generator

CAPTIONS = ["a red circle", "a blue square", "a red circle", "a blue circle"]
HELD_OUT = {"split": "held_out", "shard": "held_out-00000.tar"}
FAST = {"sampler": "dpm++2m", "num_steps": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """A finished `assemble` with a cascade to 16 px, and an `ingest` with held-out captions."""
    directory = tmp_path_factory.mktemp("store")
    ensemble = directory / "assemble" / "ensemble"
    write_generator(ensemble, streams=("t5", "clip_image"), sizes_px=(16,))
    files = [path.relative_to(directory / "assemble") for path in ensemble.rglob("*.json")]
    (directory / "ingest").mkdir()
    with ShardWriter(directory / "ingest" / "held_out-00000.tar") as writer:
        for index, caption in enumerate(CAPTIONS):
            writer.write(f"{index:05d}", {"png": b"", "txt": caption.encode()})
    shard = receipt("shard", num_out=4, files=(file("held_out-00000.tar"),), facts=HELD_OUT)
    return {
        "assemble": manifest(
            directory / "assemble",
            receipt("ensemble", files=tuple(file(str(path)) for path in files)),
            stage="assemble",
        ),
        "ingest": manifest(directory / "ingest", shard),
    }


def file(path: str) -> File:
    """A file whose content no one looks at."""
    return File(path=path, sha256="", num_bytes=0)


def stage(**values: Any) -> Sample:
    """The stage of a section that is quick to draw."""
    section = {
        "prompts": CAPTIONS[:2],
        "seeds": [5, 6],
        "enlarging": {"num_steps": 1},
        "num_held_out_captions": 2,
        "pictures_per_caption": 2,
        "batch_pictures": 3,
        **FAST,
        **values,
    }
    return Sample(config=Sampling.model_validate(section), seed=11)


def run(sample: Sample, unit: Unit, inputs: dict[str, Manifest], scratch: Path) -> Outcome:
    """Do one unit."""
    return sample.run(unit, Workspace(scratch=scratch, durable=scratch, inputs=inputs))


def pictures_of(tar: Path) -> list[tuple[str, int, Any]]:
    """Caption, seed and pixels of every sample of a tar."""
    samples = []
    for _, members in read_shard(tar):
        pixels = np.asarray(decode_image(picture_of(members)))
        samples.append((caption_of(members), json.loads(members["json"])["seed"], pixels))
    return samples


def test_units_are_the_grids_that_are_asked_for_and_the_captions(
    inputs: dict[str, Manifest], tmp_path: Path
) -> None:
    """Captions count once, in order, with as many seeds as asked, cut into batches."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    asked = {
        "styles": [{"prompt": "a red circle", "reference": str(tmp_path / "a.png")}],
        "paintings": [{"prompt": "a red circle", "painting": str(tmp_path / "a.png")}],
    }
    units = stage(**asked).plan(inputs)
    names = ["prompts", "cascade", "styles", "paintings", "held-out-0000", "held-out-0001"]
    assert [unit.id for unit in units] == names
    jobs = [job for unit in units[4:] for job in unit.arguments["jobs"]]
    assert jobs == [
        {"caption": caption, "seed": seed} for caption in CAPTIONS[:2] for seed in (11, 12)
    ]
    alone = {**inputs, "assemble": manifest(tmp_path / "alone", receipt("ensemble"))}
    assert [unit.id for unit in stage().plan(alone)][:2] == ["prompts", "held-out-0000"]


def test_held_out_pictures_carry_their_caption_and_seed(
    inputs: dict[str, Manifest], tmp_path: Path
) -> None:
    """Base and ensemble draw the same jobs at the base's size; the pictures are the library's."""
    sample = stage()
    unit = next(unit for unit in sample.plan(inputs) if unit.id == "held-out-0000")
    outcome = run(sample, unit, inputs, tmp_path)
    assert outcome.files == ["held-out-0000-base.tar", "held-out-0000-ensemble.tar"]
    assert outcome.num_out == 6
    base, ensemble = (pictures_of(tmp_path / name) for name in outcome.files)
    jobs = [(job["caption"], job["seed"]) for job in unit.arguments["jobs"]]
    assert [one[:2] for one in base] == [one[:2] for one in ensemble] == jobs
    generator = ediffi.load(inputs["assemble"].directory / "ensemble")
    captions, seeds = zip(*jobs, strict=True)
    config = sample.config.config()
    expected = generator.generate(captions, seeds=seeds, config=config, image_px=8)
    for (_, _, pixels), picture in zip(ensemble, expected, strict=True):
        assert np.array_equal(pixels, np.asarray(picture))
    assert not np.array_equal(base[0][2], ensemble[0][2])


def test_the_prompts_grid_shows_what_the_tars_hold(
    inputs: dict[str, Manifest], tmp_path: Path
) -> None:
    """A row a prompt, base then ensemble, a column a seed."""
    outcome = run(stage(), Unit(id="prompts"), inputs, tmp_path)
    assert outcome.facts == {"artifacts": ["grid.png"]}
    assert outcome.files == ["grid.png", "prompts-base.tar", "prompts-ensemble.tar"]
    drawn = pictures_of(tmp_path / "prompts-ensemble.tar")
    assert [one[:2] for one in drawn] == [(p, s) for p in CAPTIONS[:2] for s in (5, 6)]
    with Image.open(tmp_path / "grid.png") as grid:
        side = tile_px(8)
        top = 2 * TEXT_PX + side + GAP_PX + TEXT_PX  # the second prompt
        left = grid.width // 2 + side + GAP_PX  # the ensemble's second seed
        assert grid.getpixel((left, top)) == tuple(drawn[3][2][0, 0])


def test_the_cascade_shows_every_size(inputs: dict[str, Manifest], tmp_path: Path) -> None:
    """All seeds are kept at each size; the base's are those of the prompts' grid."""
    outcome = run(stage(), Unit(id="cascade"), inputs, tmp_path)
    assert outcome.files == ["cascade.png", "cascade-8px.tar", "cascade-16px.tar"]
    sizes = [pictures_of(tmp_path / name) for name in outcome.files[1:]]
    assert [{one[2].shape for one in drawn} for drawn in sizes] == [{(8, 8, 3)}, {(16, 16, 3)}]
    assert [len(drawn) for drawn in sizes] == [4, 4]
    (tmp_path / "other").mkdir()
    run(stage(), Unit(id="prompts"), inputs, tmp_path / "other")
    plain = pictures_of(tmp_path / "other" / "prompts-ensemble.tar")
    assert np.array_equal(sizes[0][3][2], plain[3][2])
    (tmp_path / "small").mkdir()
    small = run(stage(image_px=8), Unit(id="cascade"), inputs, tmp_path / "small")
    assert small.files == ["cascade.png", "cascade-8px.tar"]


def test_styles_are_drawn_without_and_with_their_reference(
    inputs: dict[str, Manifest], tmp_path: Path
) -> None:
    """The first pictures are those without a style; the reference changes them, and is shown."""
    Image.new("RGB", (30, 30), (0, 200, 0)).save(tmp_path / "green.png")
    example = {"prompt": "a red circle", "reference": str(tmp_path / "green.png")}
    outcome = run(stage(styles=[example]), Unit(id="styles"), inputs, tmp_path)
    assert outcome.files == ["styles.png", "styles-plain.tar", "styles-styled.tar"]
    plain, styled = (pictures_of(tmp_path / name) for name in outcome.files[1:])
    assert [one[:2] for one in styled] == [("a red circle", 5), ("a red circle", 6)]
    assert not np.array_equal(plain[0][2], styled[0][2])
    with Image.open(tmp_path / "styles.png") as grid:
        assert grid.getpixel((5, 2 * TEXT_PX + 5)) == (0, 200, 0)


def test_paintings_are_drawn_without_and_with_their_phrases(
    inputs: dict[str, Manifest], tmp_path: Path
) -> None:
    """The phrase, its colour and its strength reach the networks; the painting is shown."""
    canvas = Image.new("RGB", (8, 8), "white")
    canvas.paste((255, 0, 0), (0, 0, 4, 8))
    canvas.save(tmp_path / "painting.png")
    example = {
        "prompt": "a red circle",
        "painting": str(tmp_path / "painting.png"),
        "phrases": {"#ff0000": "red circle"},
        "strengths": {"#ff0000": 10.0},
    }
    outcome = run(stage(paintings=[example]), Unit(id="paintings"), inputs, tmp_path)
    assert outcome.files == ["paintings.png", "paintings-plain.tar", "paintings-painted.tar"]
    plain, painted = (pictures_of(tmp_path / name) for name in outcome.files[1:])
    assert not np.array_equal(plain[0][2], painted[0][2])
    with Image.open(tmp_path / "paintings.png") as grid:
        assert grid.getpixel((5, 2 * TEXT_PX + 5)) == (255, 0, 0)
        assert grid.getpixel((tile_px(8) - 5, 2 * TEXT_PX + 5)) == (255, 255, 255)


def test_the_fingerprint_knows_the_bytes_of_named_pictures(tmp_path: Path) -> None:
    """Another reference or mask under the same name is other work; an absent one is an error."""
    reference, masks = tmp_path / "a.png", tmp_path / "masks"
    masks.mkdir()
    named = {
        "styles": [{"prompt": "a", "reference": str(reference)}],
        "paintings": [{"prompt": "a", "painting": str(masks)}],
    }
    with pytest.raises(UserError, match=r"sample\.styles\.0\.reference: nothing at .*a\.png"):
        stage(**named).identity()
    found = []
    for path in (reference, masks / "painting.json"):
        for text in ("one", "two"):
            reference.touch()
            path.write_text(text)
            found.append(json.dumps(stage(**named).identity(), allow_nan=False))
    assert len(set(found)) == 4
    assert stage().identity()["files"] == {}


def test_only_held_out_units_are_measured(tmp_path: Path) -> None:
    """Grids are for people; whoever measures gets the captions' pictures alone."""
    units = ("prompts", "cascade", "styles", "paintings", "held-out-0000", "held-out-0001")
    made = manifest(tmp_path, *(receipt(unit) for unit in units), stage="sample")
    assert [one.unit for one in held_out_receipts(made)] == list(units[4:])
