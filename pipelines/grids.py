"""Grids of pictures for people: a row a prompt, what is compared side by side in blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from ediffi.pictures import to_pil

if TYPE_CHECKING:
    from torch import Tensor

PICTURE_PX = 96  # small pictures are enlarged to at least this, by a whole factor
GAP_PX = 4
BLOCK_GAP_PX = 24
TEXT_PX = 18


def tile_px(image_px: int) -> int:
    """Side at which a grid shows a picture."""
    return image_px * max(1, -(-PICTURE_PX // image_px))


def draw_grid(prompts: Sequence[str], blocks: Mapping[str, Tensor]) -> Image.Image:
    """Draw a labelled grid.

    Args:
        prompts: one a row.
        blocks: by title, such as a model or a size, uint8 (prompts, columns, 3, H, W); each block
            may have its own number of columns and size of pictures. All are shown at the size of
            the largest, by a whole factor where there is one.
    """
    side = tile_px(max(pictures.shape[-1] for pictures in blocks.values()))
    widths = [pictures.shape[1] * (side + GAP_PX) + BLOCK_GAP_PX for pictures in blocks.values()]
    row = side + GAP_PX + TEXT_PX
    canvas = Image.new("RGB", (sum(widths), TEXT_PX + row * len(prompts)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(TEXT_PX - 5)
    for index, prompt in enumerate(prompts):  # once a row: it may be longer than a block is wide
        pen.text((0, TEXT_PX + index * row), prompt, fill="dimgray", font=font)
    block_left = 0
    for (title, pictures), width in zip(blocks.items(), widths, strict=True):
        pen.text((block_left, 0), title, fill="black", font=font)
        for index in range(len(prompts)):
            for column, picture in enumerate(to_pil(pictures[index])):
                tile = picture.resize((side, side), Image.Resampling.NEAREST)
                left = block_left + column * (side + GAP_PX)
                canvas.paste(tile, (left, 2 * TEXT_PX + index * row))
        block_left += width
    return canvas
