"""The recipe's sections on training: settings of one run, and the experts."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import ConfigDict, field_serializer, model_validator

from ediffi.noise import NoiseInterval, SigmaDistribution, check_tiling, paper_intervals
from ediffi.train.config import TrainConfig
from pipelines.recipe_data import Fraction, Name, NonNegative, Section

# A misspelt field must be an error in the model library's own dataclasses too.
TrainConfig.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]


class Interval(Section):
    """One expert's share of the noise: edges by quantile of p(sigma), or by sigma itself."""

    name: Name
    quantiles: tuple[Fraction, Fraction] | None = None
    sigma: tuple[NonNegative, float] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Interval:
        if (self.quantiles is None) == (self.sigma is None):
            raise ValueError(f"interval {self.name!r}: give either `quantiles` or `sigma`")
        return self

    @field_serializer("sigma", when_used="json")
    def _write_infinity(self, sigma: tuple[float, float] | None) -> list[float | str] | None:
        # JSON has no infinity: it is written as the string "inf", which reads back as the number
        return None if sigma is None else [str(one) if math.isinf(one) else one for one in sigma]

    def resolve(self, distribution: SigmaDistribution) -> NoiseInterval:
        if self.quantiles is not None:
            return NoiseInterval.from_quantiles(*self.quantiles, distribution)
        assert self.sigma is not None
        return NoiseInterval(*self.sigma)


class Experts(Section):
    """How the noise axis is split, and how each expert is fine-tuned from the base."""

    split: Literal["paper"] | tuple[Interval, ...] = "paper"
    train: TrainConfig

    def intervals(self, distribution: SigmaDistribution) -> dict[str, NoiseInterval]:
        """The experts' noise intervals by name. Raises ValueError unless they tile the axis."""
        if self.split == "paper":
            return paper_intervals(distribution)
        names = [interval.name for interval in self.split]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"experts.split: two intervals are named {name!r}")
        intervals = {interval.name: interval.resolve(distribution) for interval in self.split}
        check_tiling(intervals)
        return intervals
