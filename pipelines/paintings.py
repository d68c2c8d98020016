"""Paintings as recipes and the command line name them: a picture with phrases, or a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    from ediffi.painting import Painting


def read_painting(
    path: Path, phrases: Mapping[str, str], strengths: Mapping[str, float]
) -> Painting:
    """Read a PNG whose colours name phrases, or a folder of masks that says all itself.

    Args:
        path: of either.
        phrases: colour, such as #ff0000, to phrase; of a picture alone.
        strengths: colour to strength, where it is not the default; of a picture alone.

    Raises:
        ValueError: something is missing, or given where it has no place; names the path.
    """
    from ediffi.painting import Painting

    if not path.exists():
        raise ValueError(f"no painting at {path}: name a PNG or a folder of masks")
    if path.is_dir():
        if phrases or strengths:
            raise ValueError(
                f"{path} is a folder of masks, whose painting.json names phrases and strengths: "
                "leave out those given beside it, or paint one PNG instead"
            )
        return Painting.from_masks(path)
    if not phrases:
        raise ValueError(
            f"{path} is a picture, so that each of its colours needs a phrase, such as "
            "'#ff0000=a red circle'; got none"
        )
    return Painting.from_picture(path, phrases, strengths)


def show_painting(path: Path, painting: Painting) -> Image:
    """A picture of a painting: itself, or a folder's masks in grey, darker where more is wanted."""
    from PIL import Image

    from ediffi.pictures import decode_image

    if path.is_file():
        return decode_image(path.read_bytes())
    masks = [phrase.mask_HW for phrase in painting.phrases]
    height_px, width_px = (max(mask.shape[axis] for mask in masks) for axis in (0, 1))
    canvas = Image.new("L", (width_px, height_px), 255)
    for index, mask_HW in enumerate(masks):
        grey = 200 * index // len(masks)  # each phrase has its own
        cover = Image.fromarray((mask_HW * 255).round().byte().numpy(), "L")
        canvas.paste(grey, (0, 0, width_px, height_px), cover.resize(canvas.size))
    return canvas.convert("RGB")
