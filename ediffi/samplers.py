"""Deterministic samplers of the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma.

eDiff-I section 3; Heun after EDM (arXiv 2206.00364, algorithm 1 without churn), DPM-Solver++(2M)
after arXiv 2211.01095. The state is kept in float64; every network call gets float32 and carries
its own noise level, so that an ensemble routes each call and not each step.

Shape legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ediffi.conditioning import Conditioning
from ediffi.preconditioning import DenoiserFn


@dataclass(frozen=True, kw_only=True)
class SamplerStep:
    """What a sampler tells its callback after each step."""

    index: int  # 0 for the first step
    num_steps: int
    sigma: float  # noise level the step started from
    x_BCHW: Tensor  # float64 state after the step
    denoised_BCHW: Tensor  # clean image estimate at the step's start


StepCallback = Callable[[SamplerStep], None]


class Sampler(Protocol):
    """The signature of every sampler; see `heun`."""

    def __call__(
        self,
        denoiser: DenoiserFn,
        x_BCHW: Tensor,
        sigmas: Tensor,
        conditioning: Conditioning,
        callback: StepCallback | None = None,
    ) -> Tensor:
        """Integrate from sigmas[0] to sigmas[-1]."""
        ...


@torch.no_grad()
def heun(
    denoiser: DenoiserFn,
    x_BCHW: Tensor,
    sigmas: Tensor,
    conditioning: Conditioning,
    callback: StepCallback | None = None,
) -> Tensor:
    """Heun's second-order method: two calls per step, one for a step that ends at zero.

    Args:
        denoiser: base, expert, guided or ensemble.
        x_BCHW: noise of standard deviation sigmas[0].
        sigmas: strictly decreasing, as `sigma_schedule` gives; the last may be 0.
        conditioning: one entry per picture.
        callback: called after each step.

    Returns:
        Pictures of x's shape and dtype, nominally in [-1, 1], not clipped.

    Raises:
        ValueError: `sigmas` is no such schedule.
    """
    x, dtype = x_BCHW.double(), x_BCHW.dtype
    steps = _steps(sigmas)
    for index, (sigma, sigma_next) in enumerate(steps):
        denoised = _denoise(denoiser, x, sigma, conditioning)
        slope = (x - denoised) / sigma
        x_next = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            # The correction is taken at the far end, (x_next, sigma_next).
            denoised_next = _denoise(denoiser, x_next, sigma_next, conditioning)
            slope_next = (x_next - denoised_next) / sigma_next
            x_next = x + (sigma_next - sigma) * 0.5 * (slope + slope_next)
        x = x_next
        _tell(callback, index, len(steps), sigma, x, denoised)
    return x.to(dtype)


@torch.no_grad()
def dpm_solver_pp_2m(
    denoiser: DenoiserFn,
    x_BCHW: Tensor,
    sigmas: Tensor,
    conditioning: Conditioning,
    callback: StepCallback | None = None,
) -> Tensor:
    """DPM-Solver++(2M): second order from one call per step, by reusing the previous estimate.

    In lambda = -ln sigma the linear part of the ODE is solved exactly and D is extrapolated
    linearly to the middle of the step. The first step, and one that ends at zero, are first order.
    Arguments, result and errors as `heun`.
    """
    x, dtype = x_BCHW.double(), x_BCHW.dtype
    steps = _steps(sigmas)
    previous: tuple[Tensor, float] | None = None  # estimate and length in lambda of the last step
    for index, (sigma, sigma_next) in enumerate(steps):
        denoised = _denoise(denoiser, x, sigma, conditioning)
        if sigma_next == 0:
            x = denoised
        else:
            length = math.log(sigma / sigma_next)
            middle = denoised
            if previous is not None:
                previous_denoised, previous_length = previous
                middle = denoised + (denoised - previous_denoised) * length / (2 * previous_length)
            ratio = sigma_next / sigma
            x = ratio * x + (1 - ratio) * middle
            previous = denoised, length
        _tell(callback, index, len(steps), sigma, x, denoised)
    return x.to(dtype)


SAMPLERS: dict[str, Sampler] = {"heun": heun, "dpm++2m": dpm_solver_pp_2m}


def initial_noise(
    seeds: Sequence[int], shape_CHW: tuple[int, int, int], sigma_max: float
) -> Tensor:
    """Starting noise of standard deviation sigma_max, (B, C, H, W) float32 on the CPU.

    Picture b depends on seeds[b] alone: not on the batch, the device or the machine.

    Raises:
        ValueError: a seed is negative.
    """
    if any(seed < 0 for seed in seeds):
        raise ValueError(f"seeds must not be negative, got {min(seeds)}")
    noise = [
        np.random.Generator(np.random.Philox(seed)).standard_normal(shape_CHW, dtype=np.float32)
        for seed in seeds
    ]
    return sigma_max * torch.from_numpy(np.stack(noise))


def _steps(sigmas: Tensor) -> list[tuple[float, float]]:
    """(sigma, sigma_next) of every step, after checking the schedule."""
    levels: list[float] = sigmas.double().flatten().tolist()
    decreasing = all(high > low for high, low in itertools.pairwise(levels))
    if sigmas.dim() != 1 or len(levels) < 2 or not decreasing or levels[-1] < 0:
        raise ValueError(
            "sigmas must be at least two noise levels, strictly decreasing and not negative, "
            f"got shape {tuple(sigmas.shape)} with values {levels}: use sigma_schedule"
        )
    return list(itertools.pairwise(levels))


def _denoise(denoiser: DenoiserFn, x: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
    sigma_B = torch.full((len(x),), sigma, dtype=torch.float32, device=x.device)
    return denoiser(x.float(), sigma_B, conditioning).double()


def _tell(
    callback: StepCallback | None,
    index: int,
    num_steps: int,
    sigma: float,
    x: Tensor,
    denoised: Tensor,
) -> None:
    if callback is not None:
        callback(
            SamplerStep(
                index=index, num_steps=num_steps, sigma=sigma, x_BCHW=x, denoised_BCHW=denoised
            )
        )
