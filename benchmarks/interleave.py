"""Two sides measured in turn, so that what else the machine does falls on both alike."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
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
    """Versions of this project, of Python and of `packages` as installed here; the machine."""
    installed = {name: version(name) for name in ("ediffi", *packages)}
    return {"machine": _machine(), "python": platform.python_version(), **installed}


def _machine() -> str:
    """Cores and processor, as far as the system tells."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {models[0] if models else platform.processor() or 'CPU'}"


def write_rows(rows: Sequence[Row], path: Path | None) -> None:
    """Print the rows as JSON; also write them to a file, if one is given."""
    text = json.dumps([asdict(row) for row in rows], indent=1)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    print(text)
