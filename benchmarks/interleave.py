"""Two sides measured in turn, so that what else the machine does falls on both alike."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Literal

from benchmarks.report import Row


def row(
    measure: str,
    unit: str,
    ours: Sequence[float],
    other: Sequence[float],
    *,
    other_name: str,
    better: Literal["higher", "lower"],
    command: str,
    versions: Mapping[str, str],
) -> Row:
    """One row of results from two series of runs that were taken in turn.

    Args:
        measure: what was measured.
        unit: of `ours` and `other`.
        ours: one value a run.
        other: as many of the other side, `other[i]` measured next to `ours[i]`.
        other_name: who that is.
        better: which way is better.
        command: that repeats the measurement.
        versions: of everything that has a part in it.
    """
    ratios = [a / b for a, b in zip(ours, other, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [0.0, 0.0, 0.0]
    ours_median, other_median = statistics.median(ours), statistics.median(other)
    return Row(
        measure=measure,
        unit=unit,
        ours=ours_median,
        other=other_median,
        other_name=other_name,
        ratio=ours_median / other_median,
        better=better,
        spread=(quartiles[2] - quartiles[0]) / 2,
        runs=len(ratios),
        command=command,
        versions=versions,
    )


def our_versions(*packages: str) -> dict[str, str]:
    """Versions of this project, of Python and of `packages` as installed here."""
    names = ("ediffi", *packages)
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
