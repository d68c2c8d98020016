"""Token states in eight bits: one scale a token, symmetric about zero.

The states of a text encoder differ in size from token to token far more than within one, so a
scale of its own for every token keeps the error of each relative to that token:
q = round(x / s) with s = max |x| / 127, and x is read back as q s.

Shape legend: T tokens, D width; leading batch axes are allowed wherever T is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_LEVELS = 127  # symmetric: -128 is never used, so that -x is stored as the negative of x
TOKENS, SCALE = "tokens", "tokens_scale"


def quantize_tokens(tokens_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Store token states in int8.

    Args:
        tokens_TD: floating point (..., T, D). A token of zeros stays one.

    Returns:
        int8 (..., T, D), and the scale of each token, float32 (..., T). A token that holds NaN or
        inf has a scale that is not finite, and so comes back as not finite.
    """
    x_TD = tokens_TD.float()
    scale_T = x_TD.abs().amax(dim=-1) / _LEVELS
    divisor_T = torch.where(scale_T > 0, scale_T, torch.ones_like(scale_T))
    steps_TD = (x_TD / divisor_T[..., None]).round().clamp(-_LEVELS, _LEVELS)
    return steps_TD.nan_to_num(nan=0.0).to(torch.int8), scale_T


def dequantize(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `quantize_tokens` in one sample as read from a shard.

    Returns:
        The tensors as they are if they hold no "tokens_scale"; else "tokens" in bf16 (T, D)
        without their scale, and all others untouched.

    Raises:
        ValueError: "tokens_scale" does not belong to "tokens".
    """
    if SCALE not in tensors:
        return dict(tensors)
    tokens_TD, scale_T = tensors.get(TOKENS), tensors[SCALE]
    if tokens_TD is None or tokens_TD.dtype != torch.int8 or tokens_TD.shape[:-1] != scale_T.shape:
        found = "none" if tokens_TD is None else f"{tokens_TD.dtype} {tuple(tokens_TD.shape)}"
        raise ValueError(
            f"{SCALE} of shape {tuple(scale_T.shape)} must come with int8 {TOKENS} of as many "
            f"tokens, found {found}: the sample is damaged; embed its shard again"
        )
    others = {name: tensor for name, tensor in tensors.items() if name not in (TOKENS, SCALE)}
    restored_TD = tokens_TD.to(scale_T.dtype) * scale_T[..., None]
    return {TOKENS: restored_TD.to(torch.bfloat16), **others}


def cosine_error(tokens_TD: Tensor, restored_TD: Tensor) -> Tensor:
    """How far each token has turned: 1 - cos of the angle between before and after.

    Computed as half the squared distance of the unit vectors, which loses no digits where the
    cosine is close to 1.

    Returns:
        float32 (..., T), in [0, 2]; 0 where both are zero.
    """
    unit_TD = torch.nn.functional.normalize(tokens_TD.float(), dim=-1)
    restored_unit_TD = torch.nn.functional.normalize(restored_TD.float(), dim=-1)
    return (unit_TD - restored_unit_TD).square().sum(dim=-1) / 2
