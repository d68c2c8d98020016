"""The noise levels that sampling visits (EDM, arXiv 2206.00364, equation 5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sigma_schedule(
    num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """Noise levels evenly spaced in sigma^(1/rho), from sigma_max to sigma_min, then zero.

    Args:
        num_steps: steps a sampler takes; one step jumps from sigma_max to 0.
        sigma_min: last noise level at which a network is called.
        sigma_max: noise level at which sampling starts.
        rho: larger puts more steps at low noise. eDiff-I's base model used 6 and its enlarging
            models 3 (its "order"); its grid of N steps from sigma_max to sigma_min is the one of
            N + 1 steps here, whose last goes on to zero.

    Returns:
        (num_steps + 1,) float64 on the CPU, strictly decreasing, last value 0.

    Raises:
        ValueError: `num_steps` < 1, `rho` <= 0 or not 0 < sigma_min < sigma_max < inf.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            "a schedule needs 0 < sigma_min < sigma_max < inf, "
            f"got sigma_min={sigma_min} and sigma_max={sigma_max}"
        )
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be positive and finite, got {rho}: EDM uses 7")
    roots = torch.linspace(
        sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps, dtype=torch.float64
    )
    sigmas = torch.cat([roots**rho, torch.zeros(1, dtype=torch.float64)])
    if num_steps > 1:
        sigmas[-2] = sigma_min  # exactly, not the power of a root
    sigmas[0] = sigma_max
    return sigmas
