"""Whether painted phrases come to lie where they were painted (the paper's section 5).

A detector says which pixels of a drawing show a phrase. Of them counted are those inside the
painted box, against the same seeds drawn without a painting. A box is no outline: even a perfect
drawing leaves part of it white, so IoU stays below 1; compare painted with unpainted.

Shape legend: N pictures, P phrases, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pipelines.colours import COLOURS, colour_in, pixels_of
from pipelines.recipe_sections.evaluation import PaintedCase
from pipelines.stage import Json
from pipelines.stages.evaluation.charts import picture_grid
from pipelines.stages.evaluation.material import Material, Measured

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ediffi.painting import Painting

PICTURE = "painting.png"
SHOWN_SEEDS = 4
# Maps pictures, uint8 (N, 3, H, W), and phrases to the pixels that show them, bool (N, P, H, W).
Detector = Callable[["Tensor", Sequence[str]], "NDArray[np.bool_]"]


def see_colours(pictures: Tensor, phrases: Sequence[str]) -> NDArray[np.bool_]:
    """A detector: a phrase is seen where its colour is, see `pipelines.colours`."""
    import numpy as np

    colours = [colour_in(phrase) for phrase in phrases]
    pixels = pixels_of(pictures.numpy(), colours)
    return np.stack([pixels[colour] for colour in colours], axis=1)


DETECTORS: dict[str, Detector] = {"colour": see_colours}


def measure_painting(material: Material) -> Measured:
    """Draw every case with every seed, painted and unpainted, and say where its phrases are."""
    config = material.recipe.evaluate.painting
    assert config is not None, "planned only where the recipe asks for it"
    detect, image_px = DETECTORS[config.detector], material.recipe.base_px
    cases, found = [], _Found()
    rows: dict[str, list[Tensor]] = {"painting": [], "painted": [], "unpainted": []}
    for case in config.cases:
        boxes = box_masks(case, image_px)
        drawn = _draw(material, case, boxes, config.seeds)
        phrases = [one.phrase for one in case.phrases]
        scores = {how: score(detect(one, phrases), boxes) for how, one in drawn.items()}
        found.add(scores)
        cases.append({"prompt": case.prompt, **{how: _means(one) for how, one in scores.items()}})
        for how, pictures in drawn.items():
            rows[how].append(pictures[:SHOWN_SEEDS])
        rows["painting"].append(masks_picture(boxes, phrases)[None])
    _draw_grid(material, [case.prompt for case in config.cases], rows)
    num = 2 * len(config.cases) * len(config.seeds)
    document = {"detector": config.detector, **found.to_json(material.recipe.seed), "cases": cases}
    return Measured(document={"painting": document}, pictures=(PICTURE,), num_in=num, num_out=num)


def box_masks(case: PaintedCase, image_px: int) -> NDArray[np.bool_]:
    """Which pixels have their centre in the box of each phrase, (P, H, W)."""
    import numpy as np

    centres = (np.arange(image_px) + 0.5) / image_px
    masks = []
    for left, top, right, bottom in (one.box for one in case.phrases):
        rows, columns = (
            (centres >= low) & (centres < high) for low, high in ((top, bottom), (left, right))
        )
        masks.append(rows[:, None] & columns)
    return np.stack(masks)


def masks_picture(masks_PHW: NDArray[np.bool_], phrases: Sequence[str]) -> Tensor:
    """What is painted, in the phrases' colours on white: uint8 (3, H, W)."""
    import torch

    picture = torch.full((3, *masks_PHW.shape[1:]), 255, dtype=torch.uint8)
    for mask_HW, phrase in zip(masks_PHW, phrases, strict=True):
        colour = torch.tensor(COLOURS[colour_in(phrase)], dtype=torch.uint8)
        picture[:, torch.from_numpy(mask_HW)] = colour[:, None]
    return picture


def score(seen_NPHW: NDArray[np.bool_], box_PHW: NDArray[np.bool_]) -> dict[str, list[float]]:
    """Figures of each picture, means over its phrases.

    Returns:
        `share_inside`: of the phrase's pixels those inside its box, 0 where none are seen;
        `iou`: of phrase and box; `seen`: phrases of which a pixel is seen.
    """
    import numpy as np

    num_seen = seen_NPHW.sum((2, 3))
    num_inside = (seen_NPHW & box_PHW).sum((2, 3))
    num_either = (seen_NPHW | box_PHW).sum((2, 3))
    figures = {
        "share_inside": num_inside / np.maximum(num_seen, 1),
        "iou": num_inside / np.maximum(num_either, 1),
        "seen": num_seen > 0,
    }
    return {name: values_NP.mean(1).tolist() for name, values_NP in figures.items()}


class _Found:
    """Figures of all pictures, painted and unpainted."""

    def __init__(self) -> None:
        self._scores: dict[str, dict[str, list[float]]] = {}

    def add(self, scores: dict[str, dict[str, list[float]]]) -> None:
        for how, figures in scores.items():
            for name, values in figures.items():
                self._scores.setdefault(how, {}).setdefault(name, []).extend(values)

    def to_json(self, seed: int) -> Json:
        """Means with their intervals, and the difference on equal seeds."""
        from ediffi.metrics import resampled_mean

        means = {
            how: {name: resampled_mean(values, seed=seed) for name, values in figures.items()}
            for how, figures in self._scores.items()
        }
        return {
            **{
                how: {name: one.to_json() for name, one in figures.items()}
                for how, figures in means.items()
            },
            "painted_minus_unpainted": {
                name: (one - means["unpainted"][name]).to_json()
                for name, one in means["painted"].items()
            },
        }


def _means(figures: dict[str, list[float]]) -> dict[str, float]:
    return {name: sum(values) / len(values) for name, values in figures.items()}


def _draw(
    material: Material, case: PaintedCase, boxes: NDArray[np.bool_], seeds: Sequence[int]
) -> dict[str, Tensor]:
    prompts = [case.prompt] * len(seeds)
    return {
        "painted": material.draw(prompts, seeds, painting=_painting(case, boxes)),
        "unpainted": material.draw(prompts, seeds),
    }


def _painting(case: PaintedCase, boxes: NDArray[np.bool_]) -> Painting:
    import torch

    from ediffi.painting import Painting, Phrase

    return Painting(
        tuple(
            Phrase(one.phrase, torch.from_numpy(mask).float(), one.strength)
            for one, mask in zip(case.phrases, boxes, strict=True)
        )
    )


def _draw_grid(material: Material, prompts: Sequence[str], rows: dict[str, list[Tensor]]) -> None:
    import torch

    pictures = {how: torch.stack(drawn) for how, drawn in rows.items()}
    picture_grid(material.workspace.scratch / PICTURE, prompts, pictures)
