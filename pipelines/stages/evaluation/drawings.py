"""Drawn pictures against real ones: distances and text alignment, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from pipelines.stage import Json
from pipelines.stages.evaluation.charts import picture_grid
from pipelines.stages.evaluation.material import Material, Measured, PictureSet
from pipelines.stages.sample import MODELS

if TYPE_CHECKING:
    from torch import Tensor

    from ediffi.metrics import Resampled

PICTURE = "pictures.png"
DIFFERENCE = "ensemble_minus_base"


def measure_pictures(material: Material) -> Measured:
    """Fréchet and kernel distance and alignment of what `sample` drew for held-out captions.

    `train` is the distance of as many training pictures: what perfection gives.
    """
    from ediffi.metrics import resampled_mean

    real, seed = material.held_out, material.recipe.seed
    drawn: dict[str, PictureSet] = {model: material.drawn(model) for model in MODELS}
    distances = {name: resampled_distances(material, one.pictures) for name, one in drawn.items()}
    aligned = {name: material.align(one.pictures, one.captions) for name, one in drawn.items()}
    means = {name: resampled_mean(one.scores, seed=seed) for name, one in aligned.items()}
    train = material.split("train", limit=len(real))
    floor = resampled_distances(material, train.pictures)
    differences = {kind: distances["ensemble"][kind] - distances["base"][kind] for kind in floor}
    document = {
        "num_real": len(real),
        "num_drawn": len(drawn["base"]),
        "alignment": {
            "kind": material.recipe.evaluate.alignment,
            "real": material.align(real.pictures, real.captions).to_json(seed),
            **{name: one.to_json(seed) for name, one in aligned.items()},
            DIFFERENCE: (means["ensemble"] - means["base"]).to_json(),
        },
        "distance": {
            **{name: distances_to_json(one) for name, one in distances.items()},
            "train": distances_to_json(floor),
            DIFFERENCE: distances_to_json(differences),
        },
    }
    _draw_grid(material, drawn)
    return Measured(
        document=document, pictures=(PICTURE,), num_in=len(real), num_out=len(drawn["base"])
    )


def judge(material: Material, pictures: Tensor, captions: Sequence[str]) -> Json:
    """Distances from the held-out pictures and alignment with the captions."""
    aligned = material.align(pictures, captions)
    return {
        "distance": distances_to_json(resampled_distances(material, pictures)),
        "alignment": aligned.to_json(material.recipe.seed),
        "num": len(captions),
    }


def resampled_distances(material: Material, pictures: Tensor) -> dict[str, Resampled]:
    """Every kind of distance of some pictures from the held-out ones."""
    from ediffi.metrics import DistanceKind, resampled_distance

    features_ND = material.features(pictures)
    return {
        kind: resampled_distance(
            features_ND,
            material.held_out_features,
            kind=kind,
            seed=material.recipe.seed,
            num=material.recipe.evaluate.num_resamples,
        )
        for kind in get_args(DistanceKind)
    }


def distances_to_json(distances: dict[str, Resampled]) -> Json:
    """Flat: `frechet`, `frechet_low`, `frechet_high`, and so on."""
    document: Json = {}
    for kind, one in distances.items():
        low, high = one.interval()
        document |= {kind: one.value, f"{kind}_low": low, f"{kind}_high": high}
    return document


def _draw_grid(material: Material, drawn: dict[str, PictureSet]) -> None:
    """A row a caption: drawings of either model."""
    captions = drawn["base"].captions
    first = [captions.index(caption) for caption in dict.fromkeys(captions)]
    picture_grid(
        material.workspace.scratch / PICTURE,
        [captions[index] for index in first],
        {name: one.pictures[first].unsqueeze(1) for name, one in drawn.items()},
    )
