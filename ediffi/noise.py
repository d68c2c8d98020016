"""Noise levels: the log-normal sigma distribution, noise intervals and the expert tree.

Training draws ln sigma ~ N(log_mean, log_std^2) (eDiff-I section 3, after EDM). An expert owns a
half-open slice of that axis; tree node (level l, index i) owns the i-th of 2^l slices of equal
probability, i = 0 being the least noisy (eDiff-I section 4).

Shape legend: B batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Self

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# Keeps the inverse CDF finite at both ends; 1 - 2^-53 is the largest float64 below one.
_SMALLEST_U = 2.0**-53
# Edges of deeper nodes differ from 1 by less than a float64 can tell.
_DEEPEST_LEVEL = 52


@dataclass(frozen=True, kw_only=True)
class SigmaDistribution:
    """ln sigma ~ N(log_mean, log_std^2); the paper's P_mean = -1.2 and P_std = 1.2."""

    log_mean: float = -1.2
    log_std: float = 1.2

    def __post_init__(self) -> None:
        """Raise ValueError unless log_mean is finite and log_std is positive and finite."""
        if not math.isfinite(self.log_mean):
            raise ValueError(f"log_mean must be finite, got {self.log_mean}: the paper uses -1.2")
        if not (math.isfinite(self.log_std) and self.log_std > 0):
            raise ValueError(
                f"log_std must be positive and finite, got {self.log_std}: the paper uses 1.2"
            )

    def quantile(self, q: float) -> float:
        """Sigma below which a fraction `q` of the probability lies; 0 gives 0.0 and 1 gives inf.

        Raises:
            ValueError: `q` is not in [0, 1].
        """
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"q must be a probability in [0, 1], got {q}")
        if q in (0.0, 1.0):
            return math.inf if q else 0.0
        return math.exp(self.log_mean + self.log_std * NormalDist().inv_cdf(q))

    def cdf(self, sigma: float) -> float:
        """Probability of a noise level below `sigma`; accurate far into the lower tail."""
        return 0.5 * math.erfc(-self._z(sigma) / math.sqrt(2))

    def survival(self, sigma: float) -> float:
        """Probability of a noise level of at least `sigma`; accurate far into the upper tail."""
        return 0.5 * math.erfc(self._z(sigma) / math.sqrt(2))

    def sigma_at(self, u_B: Tensor, interval: NoiseInterval) -> Tensor:
        """Map uniform draws to noise levels inside `interval` by the inverse CDF.

        Args:
            u_B: any shape, values in [0, 1); u is the fraction of the interval's probability that
                lies below the result.
            interval: the slice to draw from; `WHOLE` for the base model.

        Returns:
            float32 of the same shape, never zero, never outside [sigma_min, sigma_max) even after
            rounding.

        Raises:
            ValueError: the interval is so far out that its probability underflows.
        """
        import torch  # here, so that recipes are checked without it

        if self.cdf(interval.sigma_max) == 0 or self.survival(interval.sigma_min) == 0:
            raise ValueError(
                f"{self} puts no probability on {interval}: widen the interval or move log_mean"
            )
        mass = interval.mass(self)
        u_B = u_B.double().clamp(_SMALLEST_U, 1 - _SMALLEST_U)
        # Count probability from the nearer end of the axis: 1 - p loses all digits in the tail.
        below_B = self.cdf(interval.sigma_min) + u_B * mass
        above_B = self.survival(interval.sigma_max) + (1 - u_B) * mass
        z_B = torch.where(
            below_B < 0.5, torch.special.ndtri(below_B), -torch.special.ndtri(above_B)
        )
        sigma_B = torch.exp(self.log_mean + self.log_std * z_B).float()
        lowest, highest = interval.float32_range()
        return sigma_B.clamp(lowest, highest)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`; unknown fields raise TypeError."""
        return cls(**record)

    def _z(self, sigma: float) -> float:
        if sigma <= 0:
            return -math.inf
        return (math.log(sigma) - self.log_mean) / self.log_std


@dataclass(frozen=True)
class NoiseInterval:
    """Half-open range of noise levels [sigma_min, sigma_max)."""

    sigma_min: float = 0.0
    sigma_max: float = math.inf

    def __post_init__(self) -> None:
        """Raise ValueError unless 0 <= sigma_min < sigma_max with a float32 value between them."""
        if not 0.0 <= self.sigma_min < self.sigma_max:
            raise ValueError(
                "a noise interval must have 0 <= sigma_min < sigma_max, "
                f"got sigma_min={self.sigma_min} and sigma_max={self.sigma_max}"
            )
        lowest, highest = self.float32_range()
        if lowest > highest:
            raise ValueError(
                f"{self} holds no float32 noise level, so no network can be called in it: "
                "widen the interval"
            )

    def __str__(self) -> str:
        """Both ends with every digit, as in `[0.3011942119122021, inf)`."""
        return f"[{self.sigma_min!r}, {self.sigma_max!r})"

    def contains(self, sigma_B: Tensor) -> Tensor:
        """Bool tensor, true where sigma_min <= sigma < sigma_max; compared in float64."""
        sigma_B = sigma_B.double()  # a float32 comparison would round the edges themselves
        return (sigma_B >= self.sigma_min) & (sigma_B < self.sigma_max)

    def covers(self, other: NoiseInterval) -> bool:
        """Whether every noise level of `other` lies in this interval too."""
        return self.sigma_min <= other.sigma_min and other.sigma_max <= self.sigma_max

    def mass(self, distribution: SigmaDistribution) -> float:
        """Probability that `distribution` puts on the interval."""
        if distribution.cdf(self.sigma_min) > 0.5:
            return distribution.survival(self.sigma_min) - distribution.survival(self.sigma_max)
        return distribution.cdf(self.sigma_max) - distribution.cdf(self.sigma_min)

    def float32_range(self) -> tuple[float, float]:
        """Least positive and greatest float32 values that lie in the interval."""
        with np.errstate(over="ignore"):
            lowest, highest = np.float32(self.sigma_min), np.float32(self.sigma_max)
        if float(lowest) < self.sigma_min:
            lowest = np.nextafter(lowest, np.float32(np.inf))
        if float(highest) >= self.sigma_max:
            highest = np.nextafter(highest, np.float32(0))
        return max(float(lowest), float(np.finfo(np.float32).tiny)), float(highest)

    def to_json(self) -> dict[str, float | str]:
        """JSON has no infinity: it is written as the string "inf"."""
        sigma_max = "inf" if math.isinf(self.sigma_max) else self.sigma_max
        return {"sigma_min": self.sigma_min, "sigma_max": sigma_max}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`; missing fields raise KeyError."""
        return cls(float(record["sigma_min"]), float(record["sigma_max"]))

    @classmethod
    def from_quantiles(cls, low: float, high: float, distribution: SigmaDistribution) -> Self:
        """Build the interval between two quantiles, 0 <= low < high <= 1.

        Raises:
            ValueError: the quantiles are out of order or outside [0, 1].
        """
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(f"quantiles must have 0 <= low < high <= 1, got {low} and {high}")
        return cls(distribution.quantile(low), distribution.quantile(high))


WHOLE = NoiseInterval()


def tree_node(level: int, index: int, distribution: SigmaDistribution) -> NoiseInterval:
    """Noise interval of node E^level_index: the index-th of 2^level equal-probability slices.

    Raises:
        ValueError: `level` is negative or `index` is not in [0, 2^level).
    """
    if level < 0 or not 0 <= index < 2**level:
        raise ValueError(
            f"tree node needs level >= 0 and 0 <= index < 2^level, "
            f"got level {level} and index {index}"
        )
    slices = 2**level
    return NoiseInterval.from_quantiles(index / slices, (index + 1) / slices, distribution)


def ancestors(interval: NoiseInterval, distribution: SigmaDistribution) -> dict[str, NoiseInterval]:
    """Tree nodes that hold all of `interval`, from level 1 on, coarse to fine, by name `E<l>_<i>`.

    The whole axis (level 0) and a node equal to `interval` are left out: the first is the base, the
    second the interval itself. E^9_511 of the paper has eight ancestors, E^1_1 to E^8_255, and an
    interval that holds the median has none.
    """
    nodes: dict[str, NoiseInterval] = {}
    low, high, index = 0.0, math.inf, 0
    for level in range(1, _DEEPEST_LEVEL + 1):
        index = 2 * index
        middle = distribution.quantile((index + 1) / 2**level)
        if interval.sigma_min >= middle:
            low, index = middle, index + 1
        elif interval.sigma_max <= middle:
            high = middle
        else:
            break
        if (node := NoiseInterval(low, high)) == interval:
            break
        nodes[f"E{level}_{index}"] = node
    return nodes


def paper_intervals(distribution: SigmaDistribution) -> dict[str, NoiseInterval]:
    """The base model's three experts: E^3_0 (low), E^9_511 (high), and all that lies between."""
    low = tree_node(3, 0, distribution)
    high = tree_node(9, 511, distribution)
    middle = NoiseInterval(low.sigma_max, high.sigma_min)
    return {"low": low, "middle": middle, "high": high}


def check_tiling(intervals: Mapping[str, NoiseInterval]) -> None:
    """Check that the experts' intervals cover [0, inf) once, without gap or overlap.

    Raises:
        ValueError: naming, for every gap and overlap, the experts on both sides, the exact range
            of sigma and the remedy.
    """
    if not intervals:
        raise ValueError("an ensemble needs at least one expert, got none")
    problems = list(_tiling_problems(intervals))
    if problems:
        raise ValueError("the experts do not tile [0, inf): " + "; ".join(problems))


def _tiling_problems(intervals: Mapping[str, NoiseInterval]) -> Iterator[str]:
    ordered = sorted(intervals.items(), key=lambda item: (item[1].sigma_min, item[1].sigma_max))
    reach_name, reach = ordered[0]
    if reach.sigma_min > 0:
        yield (
            f"no expert covers {NoiseInterval(0.0, reach.sigma_min)} below {reach_name!r} {reach}: "
            f"set sigma_min of {reach_name!r} to 0.0 or add an expert there"
        )
    for name, interval in ordered[1:]:
        if interval.sigma_min > reach.sigma_max:
            yield (
                f"gap [{reach.sigma_max!r}, {interval.sigma_min!r}) between {reach_name!r} {reach} "
                f"and {name!r} {interval}: make sigma_max of {reach_name!r} equal to sigma_min of "
                f"{name!r}, or add an expert there"
            )
        elif interval.sigma_min < reach.sigma_max:
            end = min(reach.sigma_max, interval.sigma_max)
            yield (
                f"overlap [{interval.sigma_min!r}, {end!r}) of {reach_name!r} {reach} and "
                f"{name!r} {interval}: let one end where the other begins, or remove one"
            )
        if interval.sigma_max > reach.sigma_max:
            reach_name, reach = name, interval
    if reach.sigma_max < math.inf:
        yield (
            f"no expert covers [{reach.sigma_max!r}, inf) above {reach_name!r} {reach}: "
            f"set sigma_max of {reach_name!r} to inf or add an expert there"
        )
