"""Planes of a painting: w' A, a weight for each token of a stream at each pixel (paper section 5).

Shapes: B batch, T tokens, D width, H W painting.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def check_paint(paint_BTHW: Tensor, tokens_BTD: Tensor | None) -> None:
    """Raise ValueError unless there is a plane, floating point, for each token of the stream."""
    if tokens_BTD is None:
        raise ValueError("a stream with paint_BTHW must have tokens_BTD to paint, got none")
    if paint_BTHW.ndim != 4 or paint_BTHW.shape[:2] != tokens_BTD.shape[:2]:
        raise ValueError(
            f"paint_BTHW must have the shape {(*tokens_BTD.shape[:2], 'H', 'W')}, a plane for each "
            f"token, got {tuple(paint_BTHW.shape)}"
        )
    if not paint_BTHW.is_floating_point():
        raise ValueError(f"paint_BTHW must be floating point, got {paint_BTHW.dtype}")


def resize_paint(paint_BTHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring the planes of a painting to (H, W) = `size`: bilinear, antialiased, float32."""
    if paint_BTHW.shape[2:] == size:
        return paint_BTHW.float()
    return functional.interpolate(
        paint_BTHW.float(), size=size, mode="bilinear", align_corners=False, antialias=True
    )
