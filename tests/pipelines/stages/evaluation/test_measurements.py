"""The measurements on a finished run of random networks: every unit, its figures, its pictures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from ediffi.metrics import frechet_distance, kernel_distance
from pipelines.stage import Manifest, Workspace
from pipelines.stages.evaluate import MEASUREMENTS
from pipelines.stages.evaluation.material import Material
from tests.pipelines.stages.evaluation.conftest import Store

FIGURE = {"value", "low", "high"}


@pytest.fixture(scope="module")
def material(evaluated: Store) -> Material:
    """What a unit of the finished run had at hand."""
    inputs = evaluated.inputs("evaluate")
    scratch = evaluated.path.parent / "scratch"
    scratch.mkdir()
    return Material(evaluated.recipe, Workspace(scratch=scratch, durable=scratch, inputs=inputs))


def test_every_measurement_is_a_unit(evaluated: Store) -> None:
    """What the recipe has a section for is measured, each by itself, with a file and a picture."""
    units = [name for name in evaluated.done if name.startswith("evaluate/")]
    assert units == [f"evaluate/{name}" for name in MEASUREMENTS]
    for receipt in Manifest.load(evaluated.folder("evaluate")).receipts:
        document, picture = (file.path for file in receipt.files)
        assert document == f"{receipt.unit}.json"
        assert receipt.facts["artifacts"] == [document, picture]
        with Image.open(evaluated.folder("evaluate") / picture) as image:
            assert min(image.size) > 96


def test_losses_are_told_by_bin(evaluated: Store) -> None:
    """Both models in every bin on equally many draws; the last bin has no upper end."""
    losses = evaluated.document("losses")["loss"]
    assert list(losses) == ["base", "ensemble"]
    for bins in losses.values():
        assert [one["num"] for one in bins] == [8, 8]
        assert bins[0]["sigma_max"] == bins[1]["sigma_min"]
        assert bins[1]["sigma_max"] == "inf"


def test_drawings_are_judged_against_held_out_pictures(
    evaluated: Store, material: Material
) -> None:
    """The figures are the library's on what `sample` drew; grids are not among the drawings."""
    document = evaluated.document("pictures")
    assert (document["num_real"], document["num_drawn"]) == (24, 8)
    drawn = {model: material.drawn(model) for model in ("base", "ensemble")}
    assert set(drawn["base"].captions) <= set(material.held_out.captions)
    for model, pictures in drawn.items():
        features = material.features(pictures.pictures)
        distance = document["distance"][model]
        assert distance["frechet"] == frechet_distance(features, material.held_out_features)
        assert distance["kernel"] == kernel_distance(features, material.held_out_features)
        assert distance["frechet_low"] < distance["frechet"] < distance["frechet_high"]
    difference = document["distance"]["ensemble_minus_base"]["frechet"]
    base, ensemble = (document["distance"][model]["frechet"] for model in drawn)
    assert difference == pytest.approx(ensemble - base)
    scores = document["alignment"]
    assert scores["ensemble_minus_base"]["value"] == pytest.approx(
        scores["ensemble"]["score"] - scores["base"]["score"]
    )
    assert document["distance"]["train"]["frechet"] < base


def test_the_guidance_curve_draws_again_at_every_scale(
    evaluated: Store, material: Material
) -> None:
    """At each scale the distance is that of pictures drawn so, for distinct held-out captions."""
    curves = evaluated.document("guidance_curve")["guidance_curve"]
    assert {model: [one["scale"] for one in curve] for model, curve in curves.items()} == {
        "base": [1, 4],
        "ensemble": [1, 4],
    }
    prompts, seeds = material.prompts(6)
    assert len(set(prompts)) == 6
    assert seeds == [3, 4, 5, 6, 7, 8]
    again = material.features(material.draw(prompts, seeds, guidance=4.0, model="base"))
    found = curves["base"][1]["distance"]["frechet"]
    assert found == pytest.approx(frechet_distance(again, material.held_out_features), rel=1e-4)
    distances = [one["distance"]["frechet"] for curve in curves.values() for one in curve]
    assert len(set(distances)) == 4


def test_captions_come_again_when_there_are_too_few(material: Material) -> None:
    """Each is drawn once before any is drawn twice, from other noise then."""
    num = len(set(material.held_out.captions))
    prompts, seeds = material.prompts(num + 2)
    assert prompts[num:] == prompts[:2]
    assert len(set(seeds)) == num + 2


def test_the_text_ablation_drops_the_other_streams(evaluated: Store, material: Material) -> None:
    """All texts, then each alone; the drawings differ, and dropping is the library's."""
    rows = evaluated.document("text_ablation")["text_ablation"]
    assert [one["streams"] for one in rows] == [["t5", "clip_text"], ["t5"], ["clip_text"]]
    prompts, seeds = material.prompts(6)
    drawn = material.draw(prompts, seeds, dropped_streams=["clip_text"])
    distance = frechet_distance(material.features(drawn), material.held_out_features)
    assert rows[1]["distance"]["frechet"] == pytest.approx(distance, rel=1e-4)
    values = [one["distance"]["frechet"] for one in rows]
    assert all(one != other for one, other in itertools.combinations(values, 2))


def test_shares_of_attention_add_up(evaluated: Store) -> None:
    """At every noise level the streams and the null token share all of it."""
    document = evaluated.document("attention")["attention"]
    assert document["sigmas"] == [0.05, 1, 40]
    assert set(document["shares"]) == {"t5", "clip_text", "clip_image", "null"}
    totals = np.sum([[one["value"] for one in row] for row in document["shares"].values()], axis=0)
    assert totals == pytest.approx([1, 1, 1], abs=1e-5)
    assert all(set(one) == FIGURE for row in document["shares"].values() for one in row)


def test_painting_is_measured_on_equal_seeds(evaluated: Store) -> None:
    """Painted and unpainted have figures of their own, and of their difference."""
    document = evaluated.document("painting")["painting"]
    for name, how in itertools.product(
        ("share_inside", "iou", "seen"), ("painted", "unpainted", "painted_minus_unpainted")
    ):
        assert set(document[how][name]) == FIGURE
    for name, value in document["painted_minus_unpainted"].items():
        painted, unpainted = (document[how][name]["value"] for how in ("painted", "unpainted"))
        assert value["value"] == pytest.approx(painted - unpainted)
    assert [case["prompt"] for case in document["cases"]] == ["a red circle on the left"]


def test_painting_reaches_the_drawing(material: Material) -> None:
    """The box changes the pictures, and another box changes them otherwise."""
    from pipelines.recipe_sections.evaluation import PaintedCase, PaintedPhrase
    from pipelines.stages.evaluation.painting import _draw, box_masks

    drawn = []
    for box in ((0, 0, 0.5, 1), (0.5, 0, 1, 1)):
        phrase = PaintedPhrase(phrase="red circle", box=box, strength=3.0)
        case = PaintedCase(prompt="a red circle on the left", phrases=(phrase,))
        drawn.append(_draw(material, case, box_masks(case, 16), [0]))
    assert torch.equal(drawn[0]["unpainted"], drawn[1]["unpainted"])
    assert not torch.equal(drawn[0]["painted"], drawn[0]["unpainted"])
    assert not torch.equal(drawn[0]["painted"], drawn[1]["painted"])


def test_style_is_measured_beside_its_classifier(evaluated: Store) -> None:
    """Agreement with and without references, accuracy on real pictures, chance of four styles."""
    document = evaluated.document("style")["style"]
    assert (document["num"], document["num_real"], document["chance"]) == (8, 24, 0.25)
    counts = document["confusion"]
    assert {one: sum(row.values()) for one, row in counts.items()} == dict.fromkeys(
        ("circle", "ring", "square", "triangle"), 2
    )
    agreed = sum(row[one] for one, row in counts.items())
    assert document["with_reference"]["value"] == agreed / 8
    for name in ("without_reference", "real_accuracy"):
        assert 0 <= document[name]["low"] <= document[name]["value"] <= document[name]["high"] <= 1
