"""Timings of units, as one line for their stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


class UnitTimings:
    """Sums timings over units; fractions and rates are averaged."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: Counter[str] = Counter()

    def add(self, timings: Mapping[str, float]) -> None:
        for name, value in timings.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] += 1

    def summary(self) -> dict[str, float]:
        return {name: round(self._total(name), 4) for name in self._sums}

    def _total(self, name: str) -> float:
        is_averaged = name.endswith(("_fraction", "_per_s"))
        return self._sums[name] / (self._counts[name] if is_averaged else 1)
