"""Colours in words and in pixels."""

import numpy as np
import pytest

from pipelines.colours import COLOURS, colour_in, pixels_of
from pipelines.demo.shapes import coverage


def drawn(colour: tuple[int, int, int], coverage_HW: np.ndarray) -> np.ndarray:
    """One picture: the colour laid over white, uint8 (1, 3, H, W)."""
    contrast = 255 - np.array(colour)
    return np.rint(255 - coverage_HW * contrast[:, None, None]).astype(np.uint8)[None]


@pytest.mark.parametrize("name", COLOURS)
def test_a_shape_is_seen_in_its_colour_alone(name: str) -> None:
    """Every pixel that is mostly covered shows the colour, edges included, and no other colour."""
    coverage_HW = coverage("circle", centre=(0.4, 0.5), radius=0.3, image_px=32)
    found = pixels_of(drawn(COLOURS[name], coverage_HW), COLOURS)
    assert found[name][0, coverage_HW > 0.5].all()
    assert not found[name][0, coverage_HW == 0].any()
    others = [pixels for other, pixels in found.items() if other != name]
    assert not np.any(others)


@pytest.mark.parametrize("grey", [(0, 0, 0), (127, 127, 127), (250, 250, 250), (70, 75, 72)])
def test_outlines_and_shades_have_no_colour(grey: tuple[int, int, int]) -> None:
    """Black lines, grey shadows and what is nearly white are no colour."""
    found = pixels_of(drawn(grey, np.ones((4, 4))), COLOURS)
    assert not np.any(list(found.values()))


def test_the_colour_of_a_phrase_is_its_one_word_for_one() -> None:
    """The word counts, whatever its case; part of another word does not."""
    assert colour_in("a Red heart") == "red"
    assert colour_in("green-ish circle, green") == "green"
    for phrase in ("a heart", "red and blue", "a bored cat"):
        with pytest.raises(ValueError, match="exactly one colour of red, orange"):
            colour_in(phrase)
