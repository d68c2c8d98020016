"""The recipe's sections on training: settings of one run, and the experts."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from pydantic import (
    ConfigDict,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    field_serializer,
    model_validator,
)

from ediffi.noise import (
    NoiseInterval,
    SigmaDistribution,
    ancestors,
    check_tiling,
    paper_intervals,
    tree_node,
)
from ediffi.train.config import TrainConfig
from pipelines.recipe_sections.data import Fraction, Name, NonNegative, Section

# A misspelt field must be an error in the model library's own dataclasses too.
TrainConfig.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]


class Edges(Section):
    """A range of noise: its edges by quantile of p(sigma), or by sigma itself."""

    quantiles: tuple[Fraction, Fraction] | None = None
    sigma: tuple[NonNegative, float] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Edges:
        if (self.quantiles is None) == (self.sigma is None):
            raise ValueError(f"{self._what}: give either `quantiles` or `sigma`")
        return self

    @field_serializer("sigma", when_used="json")
    def _write_infinity(self, sigma: tuple[float, float] | None) -> list[float | str] | None:
        # JSON has no infinity: it is written as the string "inf", which reads back as the number
        return None if sigma is None else [str(one) if math.isinf(one) else one for one in sigma]

    @property
    def _what(self) -> str:
        return "a range of noise"

    def resolve(self, distribution: SigmaDistribution) -> NoiseInterval:
        if self.quantiles is not None:
            return NoiseInterval.from_quantiles(*self.quantiles, distribution)
        assert self.sigma is not None
        return NoiseInterval(*self.sigma)


class Interval(Edges):
    """One expert's share of the noise, and what is particular about its training."""

    name: Name
    trains_on: Edges | None = None  # a wider range, shared with neighbours; null: its own
    train: Mapping[str, Any] = {}  # fields of `experts.train` that are others here

    @property
    def _what(self) -> str:
        return f"interval {self.name!r}"


@dataclass(frozen=True, kw_only=True)
class ExpertRun:
    """One training run on the way to an expert; the last one is the expert itself."""

    name: str  # of the expert, or of a tree node such as E2_3
    interval: NoiseInterval  # what it trains on
    config: TrainConfig


NamedSplit = Literal["paper", "halves"]
_NUM_NAMED: dict[str, int] = {"paper": 3, "halves": 2}


def named_intervals(split: NamedSplit, distribution: SigmaDistribution) -> dict[str, NoiseInterval]:
    """The intervals that a word stands for, by expert name.

    `paper` is the split of the paper's base, `halves` that of its SR256: two of equal mass (eDiff-I
    section 4).
    """
    if split == "paper":
        return paper_intervals(distribution)
    return {"low": tree_node(1, 0, distribution), "high": tree_node(1, 1, distribution)}


class Experts(Section):
    """How the noise axis is split, and how each expert is fine-tuned from its parent."""

    split: NamedSplit | tuple[Interval, ...] = "paper"
    growth: Literal["direct", "levels"] = "direct"
    start_weights: Literal["ema", "raw"] = "ema"
    start_optimizer: Literal["fresh", "inherit"] = "fresh"
    start_ema: Literal["restart", "inherit"] = "restart"
    level: Mapping[str, Any] = {}  # growth levels: fields of `train` that are others at a level
    # When so many are trained and the others have failed for good, their parent stands in for them.
    min_success: PositiveInt | Literal["all"] = "all"
    train: TrainConfig

    @model_validator(mode="after")
    def _changes_fit(self) -> Experts:
        _changed(self.train, self.level, "experts.level")
        for interval in () if isinstance(self.split, str) else self.split:
            _changed(self.train, interval.train, f"experts.split, train of {interval.name!r}")
        num_experts = _NUM_NAMED[self.split] if isinstance(self.split, str) else len(self.split)
        if self.min_success != "all" and self.min_success > num_experts:
            raise ValueError(
                f"experts.min_success must be at most the number of experts, {num_experts}, or "
                f"'all', got {self.min_success}"
            )
        if self.level and self.growth == "direct":
            raise ValueError("experts.level counts only with growth 'levels': set it, or drop it")
        return self

    @property
    def needs_parent_state(self) -> bool:
        """Whether the parent's averaged weights alone are not enough to start from."""
        return self.start_weights == "raw" or self.start_optimizer == "inherit"

    def intervals(self, distribution: SigmaDistribution) -> dict[str, NoiseInterval]:
        """The experts' noise intervals by name.

        Raises:
            ValueError: they do not tile the axis, or an expert does not train on all it serves.
        """
        if isinstance(self.split, str):
            return named_intervals(self.split, distribution)
        names = [interval.name for interval in self.split]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"experts.split: two intervals are named {name!r}")
        intervals = {interval.name: interval.resolve(distribution) for interval in self.split}
        check_tiling(intervals)
        for name, served in intervals.items():
            trained = self._trains_on(name, served, distribution)
            if not trained.covers(served):
                raise ValueError(
                    f"experts.split: trains_on of {name!r} must hold its whole interval {served}, "
                    f"got {trained}: widen it"
                )
        return intervals

    def runs(self, name: str, distribution: SigmaDistribution) -> list[ExpertRun]:
        """The training runs that lead from the parent of all to an expert, in order.

        With growth "direct" there is one. With "levels" every tree node that holds all the noise
        the expert trains on comes before it, from the coarsest (eDiff-I section 4); an interval
        across the median has none and comes from that parent too.
        """
        served = self.intervals(distribution)[name]
        interval = self._trains_on(name, served, distribution)
        runs = []
        if self.growth == "levels":
            level = _changed(self.train, self.level, "experts.level")
            for node, node_interval in ancestors(interval, distribution).items():
                config = _changed(level, {"seed": _seed_of(level.seed, node)}, "experts.level")
                runs.append(ExpertRun(name=node, interval=node_interval, config=config))
        changes = {} if isinstance(self.split, str) else self._interval(name).train
        config = _changed(self.train, changes, f"experts.split, train of {name!r}")
        return [*runs, ExpertRun(name=name, interval=interval, config=config)]

    def configs(self, distribution: SigmaDistribution) -> dict[str, TrainConfig]:
        """Settings of every run of every expert, under words for people."""
        return {
            f"experts, {name}, {run.name}": run.config
            for name in self.intervals(distribution)
            for run in self.runs(name, distribution)
        }

    def check_parents(
        self, first: TrainConfig, distribution: SigmaDistribution, *, first_name: str = "base"
    ) -> None:
        """Raise ValueError if a run is to carry on an average that its parent does not have.

        Args:
            first: settings of the parent of all.
        """
        if self.start_ema == "restart":
            return
        for name in self.intervals(distribution):
            parent_name, parent = first_name, first
            for run in self.runs(name, distribution):
                if run.config.ema_profile == "power":
                    _check_tracked(f"{name}, {run.name}", run.config, parent_name, parent)
                parent_name, parent = run.name, run.config

    def _interval(self, name: str) -> Interval:
        assert not isinstance(self.split, str)
        return next(interval for interval in self.split if interval.name == name)

    def _trains_on(
        self, name: str, served: NoiseInterval, distribution: SigmaDistribution
    ) -> NoiseInterval:
        if isinstance(self.split, str) or (wider := self._interval(name).trains_on) is None:
            return served
        return wider.resolve(distribution)


_TRAIN_CONFIG = TypeAdapter(TrainConfig)


def _changed(config: TrainConfig, changes: Mapping[str, Any], where: str) -> TrainConfig:
    """`config` with other values in some fields.

    Raises:
        ValueError: a field does not exist or has a value that it may not have.
    """
    if not changes:
        return config
    known = [field.name for field in fields(TrainConfig)]
    for name in changes:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise ValueError(f"{where}: unknown field {name!r}; {hint}")
    try:
        return _TRAIN_CONFIG.validate_python({**asdict(config), **changes})
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # the message names the field and what it had
            raise ValueError(f"{where}: {first['ctx']['error']}") from error
        field = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where}: {field}: {first['msg']}, got {first['input']!r}") from error


def _check_tracked(name: str, config: TrainConfig, parent_name: str, parent: TrainConfig) -> None:
    if parent.ema_profile != "power":
        raise ValueError(
            f"experts.start_ema 'inherit' of {name} needs ema_profile 'power' of its parent "
            f"{parent_name} too, got {parent.ema_profile!r}: change it there, or restart"
        )
    if missing := sorted(set(config.ema_track_stds) - set(parent.ema_track_stds)):
        raise ValueError(
            f"experts.start_ema 'inherit' of {name}: its parent {parent_name} must have the widths "
            f"{missing} in ema_track_stds, got {list(parent.ema_track_stds)}"
        )


def _seed_of(seed: int, node: str) -> int:
    """Seed of a node's run: its own, so that no run shows the next one the same draws again."""
    digest = hashlib.sha256(f"{seed}/{node}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
