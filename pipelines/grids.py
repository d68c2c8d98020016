"""Grids of pictures for people: a row a prompt, the models side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from torch import Tensor

PICTURE_PX = 96  # small pictures are enlarged to at least this, by a whole factor
GAP_PX = 4
MODEL_GAP_PX = 24
TEXT_PX = 18


def draw_grid(prompts: Sequence[str], pictures: Mapping[str, Tensor]) -> Image.Image:
    """Draw a labelled grid.

    Args:
        prompts: one a row.
        pictures: by model, uint8 (prompts, seeds, 3, H, W); one block of columns each.
    """
    first = next(iter(pictures.values()))
    side = first.shape[-1] * max(1, -(-PICTURE_PX // first.shape[-1]))
    block = first.shape[1] * (side + GAP_PX) + MODEL_GAP_PX
    row = side + GAP_PX + TEXT_PX
    size = (block * len(pictures), TEXT_PX + row * len(prompts))
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(TEXT_PX - 5)
    for index, prompt in enumerate(prompts):  # once a row: it may be longer than a block is wide
        pen.text((0, TEXT_PX + index * row), prompt, fill="dimgray", font=font)
    for column, (model, model_pictures) in enumerate(pictures.items()):
        pen.text((column * block, 0), model, fill="black", font=font)
        for index in range(len(prompts)):
            top = TEXT_PX + index * row
            for seed_index, picture in enumerate(model_pictures[index]):
                tile = Image.fromarray(picture.permute(1, 2, 0).numpy())
                tile = tile.resize((side, side), Image.Resampling.NEAREST)
                left = column * block + seed_index * (side + GAP_PX)
                canvas.paste(tile, (left, top + TEXT_PX))
    return canvas
