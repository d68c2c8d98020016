"""Whether a drawing has the style of its reference picture (the paper's style transfer).

A classifier learns the styles from features of training pictures, and is judged on held-out ones.
Then held-out captions are drawn with held-out pictures of every style as reference, and once more
without any. Captions that name a style are no test of the reference: `caption_column` can name
others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.stage import Json
from pipelines.stages.evaluation.charts import MOST_ROWS, picture_grid
from pipelines.stages.evaluation.classifier import Classifier, fit_classifier
from pipelines.stages.evaluation.material import Material, Measured, PictureSet

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

PICTURE = "style.png"


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One picture to draw: what, from which noise, in whose style."""

    prompt: str
    seed: int
    style: str
    reference_index: int  # among the held-out pictures


def measure_style(material: Material) -> Measured:
    """How often the classifier finds the reference's style, beside its accuracy and chance."""
    config = material.recipe.evaluate.style
    assert config is not None, "planned only where the recipe asks for it"
    classify = _classifier(material)
    real_labels = labels_of(material.held_out, config.column)
    real_found = classify(material.held_out_features)
    drawings = plan_drawings(
        material.held_out,
        real_labels,
        prompts_of(material.held_out, config.caption_column),
        num=config.num_pictures,
        seed=material.recipe.seed,
    )
    prompts, seeds = [one.prompt for one in drawings], [one.seed for one in drawings]
    references = _references(material.held_out.pictures, drawings)
    drawn = {
        "with_reference": material.draw(prompts, seeds, style=references),
        "without_reference": material.draw(prompts, seeds),
    }
    found = {how: classify(material.features(pictures)) for how, pictures in drawn.items()}
    wanted = [one.style for one in drawings]
    document = {
        "column": config.column,
        "num": len(drawings),
        "num_real": len(real_labels),
        "chance": 1 / len(set(real_labels)),
        **_agreements(real_labels, real_found, wanted, found, material.recipe.seed),
        "confusion": confusion(wanted, found["with_reference"], classify.classes),
    }
    _draw_grid(material, drawings, drawn["with_reference"], len(set(real_labels)))
    return Measured(
        document={"style": document},
        pictures=(PICTURE,),
        num_in=len(drawings),
        num_out=len(drawings),
    )


def labels_of(pictures: PictureSet, column: str) -> list[str]:
    """The label of every sample.

    Raises:
        ValueError: a sample's JSON lacks the column.
    """
    return [_column(sample, column, "column") for sample in pictures.samples]


def prompts_of(pictures: PictureSet, column: str) -> list[str]:
    """The distinct captions, or what another column of the samples' JSON holds, in order."""
    if not column:
        return list(dict.fromkeys(pictures.captions))
    found = (_column(sample, column, "caption_column") for sample in pictures.samples)
    return list(dict.fromkeys(found))


def plan_drawings(
    pictures: PictureSet, labels: Sequence[str], prompts: Sequence[str], *, num: int, seed: int
) -> list[Drawing]:
    """Every prompt in every style, from the same noise, until there are `num`.

    References go round among the pictures of a style, half way round from where the prompts
    begin, so that a reference seldom shows what its prompt names.

    Raises:
        ValueError: there are more styles than drawings.
    """
    styles = sorted(set(labels))
    if num < len(styles):
        raise ValueError(
            f"evaluate.style.num_pictures: must be at least the number of styles, {len(styles)}, "
            f"got {num}"
        )
    of_style = {
        style: [index for index, label in enumerate(labels) if label == style] for style in styles
    }
    drawings = []
    for index in range(num):
        turn, style = index // len(styles), styles[index % len(styles)]
        indices = of_style[style]
        drawings.append(
            Drawing(
                prompt=prompts[turn % len(prompts)],
                seed=seed + turn,
                style=style,
                reference_index=indices[(turn + len(indices) // 2) % len(indices)],
            )
        )
    return drawings


def confusion(
    wanted: Sequence[str], found: Sequence[str], classes: Sequence[str]
) -> dict[str, dict[str, int]]:
    """How many drawings of each wanted style were taken for each."""
    pairs = list(zip(wanted, found, strict=True))
    return {one: {other: pairs.count((one, other)) for other in classes} for one in classes}


def _column(sample: Json, column: str, field: str) -> str:
    if column not in sample:
        raise ValueError(
            f"evaluate.style.{field}: must name a column that the samples' JSON has, got "
            f"{column!r}; they have: {', '.join(sample) or 'none'}"
        )
    return str(sample[column])


def _classifier(material: Material) -> Classifier:
    config = material.recipe.evaluate.style
    assert config is not None, "planned only where the recipe asks for it"
    train = material.split("train", limit=config.max_train_pictures)
    return fit_classifier(material.features(train.pictures), labels_of(train, config.column))


def _agreements(
    real_labels: Sequence[str],
    real_found: Sequence[str],
    wanted: Sequence[str],
    found: Mapping[str, Sequence[str]],
    seed: int,
) -> Json:
    from ediffi.metrics import resampled_mean

    def right(labels: Sequence[str], guesses: Sequence[str]) -> list[float]:
        return [float(one == other) for one, other in zip(labels, guesses, strict=True)]

    means = {
        "real_accuracy": resampled_mean(right(real_labels, real_found), seed=seed),
        **{how: resampled_mean(right(wanted, one), seed=seed) for how, one in found.items()},
    }
    return {name: one.to_json() for name, one in means.items()}


def _references(pictures: Tensor, drawings: Sequence[Drawing]) -> list[Image.Image]:
    from ediffi.pictures import to_pil

    return to_pil(pictures[[one.reference_index for one in drawings]])


def _draw_grid(
    material: Material, drawings: Sequence[Drawing], drawn: Tensor, num_styles: int
) -> None:
    """A row a prompt: its references, and what was drawn in their styles."""
    num_rows = min(MOST_ROWS, len(drawings) // num_styles)
    shown = drawings[: num_rows * num_styles]
    references = material.held_out.pictures[[one.reference_index for one in shown]]
    pictures = {"reference": references, "drawn": drawn[: len(shown)]}
    picture_grid(
        material.workspace.scratch / PICTURE,
        [one.prompt for one in shown[::num_styles]],
        {name: rows.unflatten(0, (num_rows, num_styles)) for name, rows in pictures.items()},
    )
