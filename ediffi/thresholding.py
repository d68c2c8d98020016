"""Dynamic thresholding of the clean image estimate (Imagen, arXiv 2205.11487, section 2.3).

Shape legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import math

from torch import Tensor

from ediffi.conditioning import Conditioning
from ediffi.preconditioning import DenoiserFn


def dynamically_thresholded(denoiser: DenoiserFn, quantile: float) -> DenoiserFn:
    """Return the denoiser clip(D, -s, s) / s, with s = max(1, quantile of |D|) of each picture.

    Strong guidance drives estimates out of [-1, 1], where no training picture lies, and they
    saturate. Every call is thresholded, so the ODE's slope (x - D) / sigma follows from the
    thresholded estimate.

    Args:
        denoiser: a guided one, as a rule.
        quantile: in (0, 1], such as 0.995; the quantile is the least of the picture's values that
            at least this fraction of them does not exceed. 1 takes the greatest.

    Raises:
        ValueError: `quantile` is not in (0, 1].
    """
    if not 0 < quantile <= 1:
        raise ValueError(
            f"threshold quantile must lie in (0, 1], got {quantile}: Imagen's is 0.995"
        )

    def thresholded(x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        denoised_BCHW = denoiser(x_BCHW, sigma_B, conditioning)
        magnitudes = denoised_BCHW.abs().flatten(1)
        rank = math.ceil(quantile * magnitudes.shape[1])
        s_B = magnitudes.kthvalue(rank, dim=1).values.clamp(min=1)
        s_B111 = s_B[:, None, None, None]
        return denoised_BCHW.clamp(-s_B111, s_B111) / s_B111

    return thresholded
