"""Where painted phrases lie: boxes, and the figures of pixels inside them."""

import numpy as np
import pytest
import torch

from pipelines.colours import COLOURS
from pipelines.recipe_sections.evaluation import PaintedCase
from pipelines.stages.evaluation.painting import box_masks, score, see_colours


def case(*boxes: tuple[float, float, float, float]) -> PaintedCase:
    """Red, green and blue circles, as many as there are boxes."""
    phrases = [f"{name} circle" for name in ("red", "green", "blue")][: len(boxes)]
    return PaintedCase.model_validate(
        {
            "prompt": " and ".join(phrases),
            "phrases": [{"phrase": one, "box": box} for one, box in zip(phrases, boxes)],
        }
    )


def test_a_box_holds_the_pixels_whose_centres_it_holds() -> None:
    """Left and top first; halves of a picture share no pixel and leave none out."""
    left, lower = box_masks(case((0, 0, 0.5, 1), (0, 0.75, 1, 1)), 4)
    assert left.tolist() == [[True, True, False, False]] * 4
    assert lower.tolist() == [[False] * 4] * 3 + [[True] * 4]
    first, second = box_masks(case((0, 0, 0.3, 1), (0.3, 0, 1, 1)), 7)
    assert (first ^ second).all()


def test_figures_count_pixels() -> None:
    """Shares and IoU of two phrases, by hand; a phrase nobody sees is nowhere."""
    boxes = box_masks(case((0, 0, 0.5, 1), (0.5, 0, 1, 1)), 4)  # 8 pixels each
    seen = np.zeros((2, 2, 4, 4), dtype=bool)
    seen[0, 0, 0, :3] = True  # 2 inside, 1 outside
    seen[0, 1, :, 2:] = True  # its box exactly
    found = score(seen, boxes)
    assert found["share_inside"] == pytest.approx([(2 / 3 + 1) / 2, 0])
    assert found["iou"] == pytest.approx([(2 / 9 + 1) / 2, 0])
    assert found["seen"] == [1, 0]


def test_colours_are_seen_where_they_are() -> None:
    """A picture painted by the boxes themselves is inside them altogether."""
    boxes = box_masks(case((0, 0, 0.5, 1), (0.5, 0, 1, 1)), 8)
    picture = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    for mask, colour in zip(boxes, ("red", "green")):
        picture[0, :, torch.from_numpy(mask)] = torch.tensor(COLOURS[colour], dtype=torch.uint8)[
            :, None
        ]
    seen = see_colours(picture, ["red circle", "green circle"])
    assert np.array_equal(seen[0], boxes)
    assert score(seen, boxes)["iou"] == [1]
    swapped = see_colours(picture, ["green circle", "red circle"])
    assert score(swapped, boxes)["share_inside"] == [0]
