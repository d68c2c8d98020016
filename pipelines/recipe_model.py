"""The recipe's sections on the model: noise levels and networks."""

from __future__ import annotations

from pydantic import PositiveInt

from ediffi.noise import SigmaDistribution
from pipelines.recipe_data import Finite, Positive, Section


class Noise(Section):
    """ln sigma ~ N(log_mean, log_std^2); `sigma_data` is the standard deviation of the data."""

    log_mean: Finite = -1.2
    log_std: Positive = 1.2
    sigma_data: Positive = 0.5

    @property
    def distribution(self) -> SigmaDistribution:
        return SigmaDistribution(log_mean=self.log_mean, log_std=self.log_std)


class Network(Section):
    """Size of the U-Net. Resolutions count pixels of the feature map, after pixel-unshuffle."""

    patch_px: PositiveInt = 1
    widths: tuple[PositiveInt, ...]
    num_blocks: PositiveInt = 3
    self_attention_px: tuple[PositiveInt, ...] = ()
    cross_attention_px: tuple[PositiveInt, ...] = ()
    head_width: PositiveInt = 64
    context_width: PositiveInt
    embedding_width: PositiveInt
