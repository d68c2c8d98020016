"""The report: one document, one page, figures under stable names."""

from __future__ import annotations

import json
import re

from pipelines.stage import Manifest
from pipelines.stages.evaluate import MEASUREMENTS
from pipelines.stages.evaluation.figures import figures
from tests.pipelines.stages.evaluation.conftest import Store


def test_the_document_joins_every_measurement(evaluated: Store) -> None:
    """`report.json` is the union of what the units found."""
    report = json.loads((evaluated.folder("report") / "report.json").read_text())
    parts = [evaluated.document(unit) for unit in MEASUREMENTS]
    assert report == {name: value for part in parts for name, value in part.items()}
    assert {"loss", "num_real", "num_drawn", "alignment", "distance"} <= set(report)


def test_the_page_shows_everything(evaluated: Store) -> None:
    """A chapter a measurement and one of drawings, with every picture inside the page."""
    page = (evaluated.folder("report") / "report.html").read_text()
    assert re.findall("<h2>(.*)</h2>", page) == [
        "Drawings",
        "Distance and alignment",
        "Loss by noise level",
        "Guidance",
        "Text encoders",
        "Attention by noise level",
        "Painting with words",
        "Style",
    ]
    assert page.count("data:image/png;base64,") == 1 + len(MEASUREMENTS)
    assert evaluated.stage("evaluate").fingerprint in page
    frechet = evaluated.document("pictures")["distance"]["ensemble"]["frechet"]
    assert f"<td>{frechet:.4g} [" in page


def test_figures_have_stable_names(evaluated: Store) -> None:
    """What MLflow and `ediffi compare` are given, all numbers."""
    receipt = Manifest.load(evaluated.folder("report")).receipt("report")
    assert receipt.facts["artifacts"] == ["report.json", "report.html"]
    found = receipt.facts["metrics"]
    names = {
        *("base/held_out_loss", "ensemble/held_out_loss/sigma_bin_01_of_2"),
        *("base/frechet_distance", "ensemble/kernel_distance", "train/frechet_distance"),
        *("real/text_alignment", "chance/text_alignment", "ensemble/text_alignment"),
        *("guidance_curve/base/best_scale", "guidance_curve/ensemble/lowest_frechet_distance"),
        *("text_ablation/t5/text_alignment", "text_ablation/t5-clip_text/frechet_distance"),
        *("attention/null/lowest_sigma", "attention/t5/highest_sigma"),
        *("painting/painted/share_inside", "painting/unpainted/iou"),
        *("style/with_reference", "style/without_reference", "style/real_accuracy"),
    }
    assert names <= set(found)
    assert all(isinstance(value, float) for value in found.values())
    losses = evaluated.document("losses")["loss"]["base"]
    assert found["base/held_out_loss"] == sum(one["mean"] for one in losses) / 2


def test_figures_of_a_short_evaluation_are_the_usual_ones(evaluated: Store) -> None:
    """What was not measured has no name at all."""
    found = figures({**evaluated.document("losses"), **evaluated.document("pictures")})
    assert {name.split("/")[0] for name in found} == {
        *("base", "ensemble", "real", "train", "chance")
    }
