"""From measured rows to benchmarks/RESULTS.md: `python -m benchmarks.report [FILE...]`.

Every benchmark writes a JSON list of rows; this module checks them and renders one table per file.
The rendering is pure: the same rows give the same bytes, so that a diff of RESULTS.md is a diff of
what was measured.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

DIRECTORY = Path(__file__).parent
_PREAMBLE = """\
# Results

Written by `python -m benchmarks.report`; edit the benchmarks, not this file. *Ratio* is ours
divided by the other's; **bold** where ours is the better side by more than the spread. *Spread* is
half the interquartile range of the ratio over the interleaved runs; within it of 1 is a tie.
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measure of both sides. Raises ValueError naming the field for what cannot be true.

    `ours` and `other` are in `unit` (medians over `runs` interleaved runs); `spread` is half the
    interquartile range of the per-run ratios; `command` repeats the measurement; `versions` maps
    what was measured, and what it ran on, to versions.
    """

    measure: str
    unit: str
    ours: float
    other: float
    other_name: str
    ratio: float
    better: Literal["higher", "lower"]
    spread: float
    runs: int
    command: str
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        for name in ("measure", "unit", "other_name", "command"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name} must be text, got {getattr(self, name)!r}")
        for name in ("ours", "other", "ratio", "spread"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be finite and not negative, got {value!r}")
        if self.better not in ("higher", "lower"):
            raise ValueError(f"better must be 'higher' or 'lower', got {self.better!r}")
        if isinstance(self.runs, bool) or not isinstance(self.runs, int) or self.runs < 1:
            raise ValueError(f"runs must be a whole number of at least 1, got {self.runs!r}")
        if not math.isclose(self.ratio * self.other, self.ours, rel_tol=0.01):
            raise ValueError(
                f"ratio must be ours/other within 1 %, got {self.ratio!r} "
                f"for {self.ours!r} and {self.other!r}"
            )
        if not isinstance(self.versions, Mapping) or not self.versions:
            raise ValueError(f"versions must name what was measured, got {self.versions!r}")

    @property
    def wins(self) -> bool:
        """True where ours is better by more than the spread."""
        if self.better == "higher":
            return self.ratio - self.spread > 1
        return self.ratio + self.spread < 1

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Build a row from parsed JSON. Raises ValueError for unknown or missing fields."""
        if not isinstance(value, dict):
            raise ValueError(f"a row must be an object, got {type(value).__name__}")
        names = {f.name for f in fields(cls)}
        if unknown := sorted(value.keys() - names):
            raise ValueError(f"unknown field {unknown[0]!r}: known are {', '.join(sorted(names))}")
        if missing := sorted(names - value.keys()):
            raise ValueError(f"missing field {missing[0]!r}")
        return cls(**value)


def load_rows(path: Path) -> list[Row]:
    """Read one benchmark's rows. Raises ValueError naming the file and the row."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, list):
        raise ValueError(f"{path}: must hold a list of rows, got {type(values).__name__}")
    rows = []
    for row_index, value in enumerate(values):
        try:
            rows.append(Row.from_json(value))
        except ValueError as error:
            raise ValueError(f"{path}: row {row_index}: {error}") from error
    return rows


def render(rows: Mapping[str, Sequence[Row]], notes: Mapping[str, str] | None = None) -> str:
    """Render the rows of each benchmark, by name, as one Markdown page.

    Args:
        rows: of each benchmark.
        notes: words on a benchmark, such as what was not run, or why a side loses.
    """
    notes = notes or {}
    sections = []
    for name in sorted(rows.keys() | notes.keys()):
        sections.append(f"## {name}\n")
        if name in notes:
            sections.append(notes[name].strip() + "\n")
        if name in rows:
            sections.append(_table(rows[name]))
    return "\n".join([_PREAMBLE, *sections])


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| measure | ours | other | other side | ratio | spread | better | runs |",
        "|---|--:|--:|---|--:|--:|---|--:|",
    ]
    lines += [_line(row) for row in rows]
    versions = dict(item for row in rows for item in row.versions.items())
    lines += ["", *(f"    {command}" for command in dict.fromkeys(row.command for row in rows))]
    lines += ["", ", ".join(f"{package} {versions[package]}" for package in sorted(versions)), ""]
    return "\n".join(lines)


def _line(row: Row) -> str:
    ratio = f"**{row.ratio:.2f}**" if row.wins else f"{row.ratio:.2f}"
    cells = (
        row.measure,
        f"{row.ours:.4g} {row.unit}",
        f"{row.other:.4g} {row.unit}",
        row.other_name,
        ratio,
        f"±{row.spread:.2f}",
        row.better,
        str(row.runs),
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the results page; exit code 2 for rows that cannot be true."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "files", nargs="*", type=Path, help="JSON rows; all results and notes if none"
    )
    parser.add_argument("--output", type=Path, default=DIRECTORY / "RESULTS.md")
    options = parser.parse_args(arguments)
    paths = options.files or sorted((DIRECTORY / "results").glob("*.json"))
    words = [] if options.files else sorted((DIRECTORY / "results").glob("*.md"))
    if not paths:
        print(
            "no results: run a benchmark with --json benchmarks/results/NAME.json", file=sys.stderr
        )
        return 2
    try:
        notes = {path.stem: path.read_text(encoding="utf-8") for path in words}
        page = render({path.stem: load_rows(path) for path in paths}, notes)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    options.output.write_text(page, encoding="utf-8")
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
