"""Classifier-free guidance (arXiv 2207.12598) as a denoiser around a denoiser.

Shape legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import math

from torch import Tensor

from ediffi.conditioning import Conditioning
from ediffi.preconditioning import DenoiserFn


def guided(denoiser: DenoiserFn, scale: float) -> DenoiserFn:
    """Return the denoiser D_null + scale (D_conditional - D_null).

    D_null sees every stream dropped, as training showed it. Both come from one call on a batch of
    2B; at scale 1 they cancel to D_conditional and only that is computed.

    Raises:
        ValueError: `scale` is negative or not finite.
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(
            f"guidance scale must be finite and not negative, got {scale}: 1 turns guidance off"
        )
    if scale == 1:
        return denoiser

    def guided_denoiser(x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        both = Conditioning.concatenate([conditioning, conditioning.null()])
        denoised = denoiser(x_BCHW.repeat(2, 1, 1, 1), sigma_B.repeat(2), both)
        conditional_BCHW, null_BCHW = denoised.chunk(2)
        return null_BCHW + scale * (conditional_BCHW - null_BCHW)

    return guided_denoiser
