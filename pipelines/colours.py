"""Words for colours, and which pixels of a picture on white show them.

A pixel is white minus coverage times the colour's contrast (white - colour), so also on antialiased
edges its contrast points in the direction of the colour. What points nearer to grey than to any
colour, or hardly leaves white, shows none. Nothing is learned, and nothing but colour is seen: the
detector cannot tell a red heart from a red circle, and is at a loss on photographs.

Shape suffixes: N pictures, C channels, H height, W width.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 45, 60),
    "orange": (245, 145, 30),
    "yellow": (252, 210, 50),
    "green": (90, 170, 70),
    "blue": (50, 125, 220),
    "purple": (145, 90, 190),
    "brown": (150, 85, 50),
}
GREY = (127, 127, 127)
FAINTEST = 60.0  # distance from white, of at most 442, below which a pixel is background


def colour_in(phrase: str) -> str:
    """The one colour that a phrase such as `red heart` names.

    Raises:
        ValueError: it names none, or several.
    """
    found = [word for word in re.findall(r"[a-z]+", phrase.lower()) if word in COLOURS]
    if len(set(found)) != 1:
        raise ValueError(
            f"phrase must name exactly one colour of {', '.join(COLOURS)}, got {phrase!r}"
        )
    return found[0]


def pixels_of(
    pictures_NCHW: NDArray[np.uint8], colours: Iterable[str]
) -> dict[str, NDArray[np.bool_]]:
    """Which pixels show each colour: (N, H, W) a colour.

    Args:
        pictures_NCHW: uint8, three channels.
        colours: words of `COLOURS`.
    """
    import numpy as np

    contrast = 255.0 - pictures_NCHW.astype(np.float64)
    palette = np.array([*COLOURS.values(), GREY], dtype=np.float64)
    directions = 255.0 - palette
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    nearest_NHW = np.einsum("nchw,kc->nkhw", contrast, directions).argmax(1)
    is_drawn_NHW = np.linalg.norm(contrast, axis=1) > FAINTEST
    names = list(COLOURS)
    return {name: is_drawn_NHW & (nearest_NHW == names.index(name)) for name in colours}
