"""Classifier-free guidance (arXiv 2207.12598) as a denoiser around a denoiser.

Beside the plain form: in a part of the noise axis only (after arXiv 2404.07724), and rescaled
(arXiv 2305.08891, section 3.4).

Shape legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ediffi.conditioning import Conditioning
from ediffi.noise import WHOLE, NoiseInterval
from ediffi.preconditioning import DenoiserFn


def guided(
    denoiser: DenoiserFn,
    scale: float,
    *,
    interval: NoiseInterval = WHOLE,
    rescale: float = 0.0,
) -> DenoiserFn:
    """Return the denoiser D_null + scale (D_conditional - D_null).

    D_null sees every stream dropped, as training showed it. Both come from one call on a batch of
    2B; at scale 1 they cancel to D_conditional and only that is computed. A picture whose noise
    level lies outside `interval` gets D_conditional alone, from a call of its own: samplers give
    all pictures of a call the same level, so that outside there is one call on a batch of B.

    Args:
        denoiser: base, expert or ensemble.
        scale: 0 is D_null, 1 D_conditional.
        interval: noise levels at which to guide.
        rescale: in [0, 1], how far the guided estimate is brought back to the standard deviation
            of the conditional one; see `_rescaled`.

    Raises:
        ValueError: `scale` is negative or not finite, or `rescale` is not in [0, 1].
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(
            f"guidance scale must be finite and not negative, got {scale}: 1 turns guidance off"
        )
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance rescale must lie in [0, 1], got {rescale}: 0 turns it off")
    if scale == 1:
        return denoiser

    def guided_inside(x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        both = Conditioning.concatenate([conditioning, conditioning.null()])
        denoised = denoiser(x_BCHW.repeat(2, 1, 1, 1), sigma_B.repeat(2), both)
        conditional_BCHW, null_BCHW = denoised.chunk(2)
        guided_BCHW = null_BCHW + scale * (conditional_BCHW - null_BCHW)
        return _rescaled(guided_BCHW, conditional_BCHW, rescale) if rescale else guided_BCHW

    if interval == WHOLE:
        return guided_inside
    return _divided(guided_inside, denoiser, interval)


def _divided(inside: DenoiserFn, outside: DenoiserFn, interval: NoiseInterval) -> DenoiserFn:
    """Let one denoiser answer for noise levels inside the interval and another for the rest."""

    def divided(x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        inside_B = interval.contains(sigma_B)
        if inside_B.all():
            return inside(x_BCHW, sigma_B, conditioning)
        if not inside_B.any():
            return outside(x_BCHW, sigma_B, conditioning)
        denoised_BCHW = torch.empty_like(x_BCHW)
        for own_B, denoiser in ((inside_B, inside), (~inside_B, outside)):
            denoised_BCHW[own_B] = denoiser(
                x_BCHW[own_B], sigma_B[own_B], conditioning.select(own_B)
            )
        return denoised_BCHW

    return divided


def _rescaled(guided_BCHW: Tensor, conditional_BCHW: Tensor, rescale: float) -> Tensor:
    """D_guided (rescale std(D_conditional) / std(D_guided) + 1 - rescale), deviations per picture.

    arXiv 2305.08891, section 3.4. It is right for the clean image estimate: what guidance
    overdoes is the picture's contrast, and that is the deviation of D. Applied to the noise
    estimate (x - D) / sigma it would change how much noise a step removes. Their own network
    estimates v, which at the high noise where contrast is decided is -D to within a factor; at low
    noise both deviations are the picture's own and nothing changes.
    """
    conditional_B111 = conditional_BCHW.std(dim=(1, 2, 3), keepdim=True)
    guided_B111 = guided_BCHW.std(dim=(1, 2, 3), keepdim=True)
    # A picture of one value has no contrast to bring back.
    flat_B111 = guided_B111 == 0
    ratio_B111 = conditional_B111 / guided_B111.masked_fill(flat_B111, 1)
    ratio_B111 = ratio_B111.masked_fill(flat_B111, 1)
    return guided_BCHW * (rescale * ratio_B111 + 1 - rescale)
