"""Pictures drawn while training: held-out conditionings, the same ones with the same noise always.

Shape legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ediffi.conditioning import Conditioning
from ediffi.ensemble import Ensemble
from ediffi.noise import WHOLE, NoiseInterval
from ediffi.preconditioning import Denoiser, DenoiserFn
from ediffi.sampling import SamplingConfig, draw, to_uint8

_COLUMNS = 8
_GAP_PX = 2
_SMALLEST_PX = 64  # smaller pictures are enlarged to at least this, by a whole factor


@dataclass(frozen=True, kw_only=True)
class GridConfig(SamplingConfig):
    """Which pictures a grid shows, and how they are drawn.

    Raises:
        ValueError: a field is out of range; the message names it, what was required and found.
    """

    num_pictures: int = 16  # the first held-out samples
    seed: int = 0  # picture i starts from noise of seed + i
    dropped_streams: tuple[str, ...] = ()  # not given to the model, as embeddings of the picture

    def __post_init__(self) -> None:
        """Check every field; see the class."""
        super().__post_init__()
        if self.num_pictures < 1:
            raise ValueError(f"grid.num_pictures must be at least 1, got {self.num_pictures}")
        if self.seed < 0:
            raise ValueError(f"grid.seed must not be negative, got {self.seed}")


def draw_pictures(
    denoiser: DenoiserFn,
    config: GridConfig,
    picture_indices: Sequence[int],
    conditioning: Conditioning,
    shape_CHW: tuple[int, int, int],
    device: torch.device,
) -> Tensor:
    """Draw some of a grid's pictures.

    Args:
        denoiser: of the whole noise axis, in eval mode; see `routed`.
        config: how.
        picture_indices: their places in the grid.
        conditioning: theirs, on `device`.
        shape_CHW: of a picture.
        device: where to draw.

    Returns:
        uint8 (B, C, H, W) on the CPU.
    """
    conditioning = conditioning.without(config.dropped_streams)
    seeds = [config.seed + index for index in picture_indices]
    pictures = draw(
        denoiser, conditioning, seeds=seeds, shape_CHW=shape_CHW, config=config, device=device
    )
    return to_uint8(pictures)


def routed(own: Denoiser, interval: NoiseInterval, parent: Denoiser | None) -> DenoiserFn:
    """Let `own` answer inside its interval and its parent elsewhere: alone it cannot draw."""
    if interval == WHOLE:
        return own
    assert parent is not None
    experts = {"own": (interval, own)}
    if interval.sigma_min > 0:
        experts["below"] = (NoiseInterval(0.0, interval.sigma_min), parent)
    if interval.sigma_max < WHOLE.sigma_max:
        experts["above"] = (NoiseInterval(interval.sigma_max, WHOLE.sigma_max), parent)
    return Ensemble(experts).eval()


def tile(rows: Sequence[Tensor]) -> Tensor:
    """Put pictures onto one white canvas, eight samples side by side.

    Args:
        rows: uint8 (B, 3, h, w) each, as many pictures in each; a sample's pictures stand below one
            another. Smaller ones are repeated up to the size of the largest.

    Returns:
        uint8 (H, W, 3).
    """
    side_px = max(row.shape[-1] for row in rows)
    side_px *= -(-_SMALLEST_PX // side_px) if side_px < _SMALLEST_PX else 1
    enlarged = [_enlarge(row, side_px) for row in rows]
    num_pictures, step_px = len(rows[0]), side_px + _GAP_PX
    num_blocks = -(-num_pictures // _COLUMNS)
    columns = min(num_pictures, _COLUMNS)
    height_px = num_blocks * (len(rows) * step_px + _GAP_PX) - 2 * _GAP_PX
    canvas = torch.full((3, height_px, columns * step_px - _GAP_PX), 255, dtype=torch.uint8)
    for index in range(num_pictures):
        block, column = divmod(index, _COLUMNS)
        left = column * step_px
        for row_index, row in enumerate(enlarged):
            top = block * (len(rows) * step_px + _GAP_PX) + row_index * step_px
            canvas[:, top : top + side_px, left : left + side_px] = row[index]
    return canvas.permute(1, 2, 0).contiguous()


def _enlarge(pictures_BCHW: Tensor, side_px: int) -> Tensor:
    factor = side_px // pictures_BCHW.shape[-1]
    return pictures_BCHW.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def write_png(path: Path, picture_HWC: Tensor) -> None:
    """Write a picture so that a file of this name is always whole."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("wb") as file:
        Image.fromarray(picture_HWC.numpy()).save(file, "png")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
