"""From noise to pictures: one configuration and one call around schedule, guidance and samplers.

Shape legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ediffi.conditioning import Conditioning
from ediffi.guidance import guided
from ediffi.noise import NoiseInterval
from ediffi.preconditioning import DenoiserFn
from ediffi.samplers import SAMPLERS, Churn, Sampler, StepCallback, churn_noise, heun, initial_noise
from ediffi.schedule import sigma_schedule
from ediffi.thresholding import dynamically_thresholded


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How noise becomes a picture. The defaults are EDM's grid and a mild guidance.

    Network calls a picture, doubled where guidance acts: heun 2 num_steps - 1, dpm++2m num_steps,
    deis 3 num_steps + 1. The paper's base: deis with rho 6 and 25 steps.

    Raises:
        ValueError: a field is out of range; the message names it, what was required and found.
    """

    sampler: Literal["heun", "dpm++2m", "deis"] = "heun"
    num_steps: int = 18
    guidance: float = 2.0  # 1: conditional only
    # Sigmas [low, high) at which guidance acts; elsewhere the conditional estimate alone.
    guidance_interval: tuple[float, float] = (0.0, math.inf)
    guidance_rescale: float = 0.0  # in [0, 1], of the guided estimate's contrast; 0: none
    dynamic_threshold: float = 0.0  # quantile of |D| per picture, such as 0.995; 0: none
    churn: float = 0.0  # EDM's S_churn, heun only; 0: deterministic
    churn_sigma_min: float = 0.0
    churn_sigma_max: float = math.inf
    churn_noise: float = 1.0  # EDM's S_noise
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    batch_pictures: int = 64  # drawn at once, at most

    def __post_init__(self) -> None:
        """Check every field; see the class."""
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}")
        if self.batch_pictures < 1:
            raise ValueError(f"batch_pictures must be at least 1, got {self.batch_pictures}")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(
                f"guidance must be finite and not negative, got {self.guidance}: 1 turns it off"
            )
        for field in ("guidance_rescale", "dynamic_threshold"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} must lie in [0, 1], got {getattr(self, field)}")
        if len(self.guidance_interval) != 2:
            raise ValueError(
                f"guidance_interval must be two sigmas, low and high, got {self.guidance_interval}"
            )
        low, high = self.guidance_interval
        if not 0 <= low < high:
            raise ValueError(f"guidance_interval must have 0 <= low < high, got {low} and {high}")
        self._check_churn()
        self.sigmas()

    def _check_churn(self) -> None:
        if not 0 <= self.churn < math.inf:
            raise ValueError(f"churn must be finite and not negative, got {self.churn}")
        if self.churn and self.sampler != "heun":
            raise ValueError(
                f"churn must be 0 with sampler {self.sampler}, got {self.churn}: use heun"
            )
        if not 0 <= self.churn_sigma_min <= self.churn_sigma_max:
            raise ValueError(
                "churn needs 0 <= churn_sigma_min <= churn_sigma_max, "
                f"got {self.churn_sigma_min} and {self.churn_sigma_max}"
            )
        if not 0 < self.churn_noise < math.inf:
            raise ValueError(f"churn_noise must be positive and finite, got {self.churn_noise}")

    def sigmas(self) -> Tensor:
        """Noise levels to visit, as `sigma_schedule` gives them.

        The paper's grid of N steps, which deis takes, has its N-th step end at sigma_min. There the
        estimate D is returned, which is what the other samplers' last step to zero does too: one
        call more, and no noise of deviation sigma_min is left in the picture.
        """
        num_steps = self.num_steps + 1 if self.sampler == "deis" else self.num_steps
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
        return sigma_schedule(
            num_steps, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho
        )


def draw(
    denoiser: DenoiserFn,
    conditioning: Conditioning,
    *,
    seeds: Sequence[int],
    shape_CHW: tuple[int, int, int],
    config: SamplingConfig,
    device: str | torch.device = "cpu",
    stage: int = 0,
    callback: StepCallback | None = None,
) -> Tensor:
    """Draw one picture a seed.

    A picture depends on its seed, its conditioning, the stage and `config`; on nothing else in the
    batch beyond the rounding of the network's kernels.

    Args:
        denoiser: of the whole noise axis, in eval mode, on `device`; not guided yet.
        conditioning: one entry a seed, in a precision that the network takes; moved to `device`.
        seeds: not negative.
        shape_CHW: of a picture.
        config: how; at most `batch_pictures` are drawn at once.
        device: where to draw.
        stage: 0 for the base, k for the k-th network after it: other noise for the same seed.
        callback: called after each step, batch after batch.

    Returns:
        float32 (B, C, H, W) on `device`, nominally in [-1, 1], not clipped.

    Raises:
        ValueError: seeds and conditioning differ in number, or a seed or the stage is negative.
    """
    if len(seeds) != conditioning.batch_size:
        raise ValueError(
            f"conditioning must have one entry a seed ({len(seeds)}), got {conditioning.batch_size}"
        )
    denoiser = guided(
        denoiser,
        config.guidance,
        interval=NoiseInterval(*config.guidance_interval),
        rescale=config.guidance_rescale,
    )
    if config.dynamic_threshold:
        denoiser = dynamically_thresholded(denoiser, config.dynamic_threshold)
    sigmas, batches = config.sigmas(), []
    for start in range(0, len(seeds), config.batch_pictures):
        own = seeds[start : start + config.batch_pictures]
        x_BCHW = initial_noise(own, shape_CHW, config.sigma_max, stage=stage).to(device)
        part = conditioning
        if len(own) < len(seeds):
            part = conditioning.select(torch.arange(start, start + len(own)))
        sampler = _sampler(config, own, shape_CHW, stage)
        batches.append(sampler(denoiser, x_BCHW, sigmas, part.to(device), callback))
    return torch.cat(batches)


def _sampler(
    config: SamplingConfig, seeds: Sequence[int], shape_CHW: tuple[int, int, int], stage: int
) -> Sampler:
    """The sampler of `config`, with churn if it asks for any."""
    if not config.churn:
        return SAMPLERS[config.sampler]
    churn = Churn(
        amount=config.churn,
        noise=lambda step_index: churn_noise(seeds, shape_CHW, step_index, stage=stage),
        sigma_min=config.churn_sigma_min,
        sigma_max=config.churn_sigma_max,
        noise_scale=config.churn_noise,
    )
    return functools.partial(heun, churn=churn)


def to_uint8(pictures_BCHW: Tensor) -> Tensor:
    """Pictures in [-1, 1] (clipped) as uint8 on the CPU."""
    return ((pictures_BCHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
