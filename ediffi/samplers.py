"""Samplers of the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma.

eDiff-I section 3. Heun's method is EDM's (arXiv 2206.00364, algorithm 1; with churn, algorithm 2),
DPM-Solver++(2M) is from arXiv 2211.01095, DEIS with Kutta's third-order method from
arXiv 2204.13902. The state is kept in float64; every network call gets float32 and carries its own
noise level, so that an ensemble routes each call and not each step.

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


@dataclass(frozen=True, kw_only=True)
class Churn:
    """Fresh noise before a step (EDM, algorithm 2): S_churn, S_min, S_max, S_noise and its source.

    A step from a sigma in [sigma_min, sigma_max] starts from (1 + gamma) sigma instead, with
    gamma = min(amount / number of steps, sqrt(2) - 1).
    """

    amount: float
    noise: Callable[[int], Tensor]  # step index -> standard normal values of x's shape
    sigma_min: float = 0.0
    sigma_max: float = math.inf
    noise_scale: float = 1.0  # standard deviation of what is added, relative to what it should be

    def apply(
        self, x: Tensor, sigma: float, step_index: int, num_steps: int
    ) -> tuple[Tensor, float]:
        """The state and its noise level after noise was added; both untouched out of range."""
        if self.amount == 0 or not self.sigma_min <= sigma <= self.sigma_max:
            return x, sigma
        raised = sigma * (1 + min(self.amount / num_steps, math.sqrt(2) - 1))
        added = self.noise_scale * math.sqrt(raised**2 - sigma**2)
        return x + added * self.noise(step_index).to(x), raised


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
    *,
    churn: Churn | None = None,
) -> Tensor:
    """Heun's second-order method: two calls per step, one for a step that ends at zero.

    Args:
        denoiser: base, expert, guided or ensemble.
        x_BCHW: noise of standard deviation sigmas[0].
        sigmas: strictly decreasing, as `sigma_schedule` gives; the last may be 0.
        conditioning: one entry per picture.
        callback: called after each step.
        churn: adds noise before steps; without it the sampler is deterministic.

    Returns:
        Pictures of x's shape and dtype, nominally in [-1, 1], not clipped.

    Raises:
        ValueError: `sigmas` is no such schedule.
    """
    x, dtype = x_BCHW.double(), x_BCHW.dtype
    steps = _steps(sigmas)
    for index, (sigma, sigma_next) in enumerate(steps):
        start = sigma
        if churn is not None:
            x, start = churn.apply(x, sigma, index, len(steps))
        denoised = _denoise(denoiser, x, start, conditioning)
        slope = (x - denoised) / start
        x_next = x + (sigma_next - start) * slope
        if sigma_next > 0:
            # The correction is taken at the far end, (x_next, sigma_next).
            denoised_next = _denoise(denoiser, x_next, sigma_next, conditioning)
            slope_next = (x_next - denoised_next) / sigma_next
            x_next = x + (sigma_next - start) * 0.5 * (slope + slope_next)
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


@torch.no_grad()
def deis_3kutta(
    denoiser: DenoiserFn,
    x_BCHW: Tensor,
    sigmas: Tensor,
    conditioning: Conditioning,
    callback: StepCallback | None = None,
) -> Tensor:
    """DEIS "3-kutta", the paper's sampler: third order from three calls per step.

    EDM's ODE has no drift of its own, so rho-RK DEIS is Kutta's method on dx/dsigma itself: slopes
    at the step's start, its middle and its end, weighted 1 : 4 : 1. The last divides by the step's
    end, so a step that ends at zero is taken as the other samplers take it: one call, x = D.
    Arguments, result and errors as `heun`.
    """
    x, dtype = x_BCHW.double(), x_BCHW.dtype
    steps = _steps(sigmas)
    for index, (sigma, sigma_next) in enumerate(steps):
        denoised = _denoise(denoiser, x, sigma, conditioning)
        if sigma_next == 0:
            x = denoised
        else:
            length, sigma_middle = sigma_next - sigma, 0.5 * (sigma + sigma_next)
            slope_1 = (x - denoised) / sigma
            x_2 = x + 0.5 * length * slope_1
            slope_2 = (x_2 - _denoise(denoiser, x_2, sigma_middle, conditioning)) / sigma_middle
            x_3 = x + length * (2 * slope_2 - slope_1)
            slope_3 = (x_3 - _denoise(denoiser, x_3, sigma_next, conditioning)) / sigma_next
            x = x + length * (slope_1 + 4 * slope_2 + slope_3) / 6
        _tell(callback, index, len(steps), sigma, x, denoised)
    return x.to(dtype)


SAMPLERS: dict[str, Sampler] = {"heun": heun, "dpm++2m": dpm_solver_pp_2m, "deis": deis_3kutta}


def initial_noise(
    seeds: Sequence[int],
    shape_CHW: tuple[int, int, int],
    sigma_max: float,
    *,
    stage: int = 0,
) -> Tensor:
    """Starting noise of standard deviation sigma_max, (B, C, H, W) float32 on the CPU.

    Picture b depends on seeds[b] and the stage alone: not on the batch, the device or the machine.

    Args:
        seeds: one a picture, not negative.
        shape_CHW: of a picture.
        sigma_max: noise level at which sampling starts.
        stage: 0 for the base; another network of a cascade draws other noise from the same seed.

    Raises:
        ValueError: a seed or the stage is negative, or there are no seeds.
    """
    return sigma_max * _standard_normal(seeds, shape_CHW, stage, 0)


def churn_noise(
    seeds: Sequence[int],
    shape_CHW: tuple[int, int, int],
    step_index: int,
    *,
    stage: int = 0,
) -> Tensor:
    """Standard normal noise for one step's churn: a function of (seed, step, stage) per picture.

    Arguments, result and errors as `initial_noise`.
    """
    return _standard_normal(seeds, shape_CHW, stage, 1 + step_index)


def _standard_normal(
    seeds: Sequence[int], shape_CHW: tuple[int, int, int], stage: int, index: int
) -> Tensor:
    """Noise of place `index` (0: the start) of a stage; each place has a stream of its own."""
    if not seeds:
        raise ValueError("seeds must name at least one picture, got none")
    if any(seed < 0 for seed in seeds):
        raise ValueError(f"seeds must not be negative, got {min(seeds)}")
    if stage < 0:
        raise ValueError(f"stage must not be negative, got {stage}: 0 is the base")
    # The base starts from the seed's own stream, all else from streams spawned of it.
    place = (stage, index) if stage or index else ()
    noise = [
        np.random.Generator(
            np.random.Philox(np.random.SeedSequence(seed, spawn_key=place))
        ).standard_normal(shape_CHW, dtype=np.float32)
        for seed in seeds
    ]
    return torch.from_numpy(np.stack(noise))


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
