"""Series of runs become one row: medians, ratio, spread of the per-run ratios."""

import os

import pytest

from benchmarks.interleave import our_versions, row

ABOUT = {
    "other_name": "b",
    "better": "higher",
    "command": "python -m benchmarks.x",
    "versions": {"a": "1"},
}


def test_row_has_medians_and_the_spread_of_ratios() -> None:
    """Ratios 1, 2, 3, 4, 5: half the interquartile range is 1.5; medians are of each side."""
    found = row("m", "samples/s", [10, 20, 30, 40, 50], [10] * 5, **ABOUT)
    assert (found.ours, found.other, found.ratio, found.runs) == (30, 10, 3, 5)
    assert found.spread == pytest.approx(1.5)


def test_single_run_has_no_spread() -> None:
    """A smoke test of one run gives a row too."""
    assert row("m", "s", [2.0], [4.0], **ABOUT).spread == 0


def test_runs_come_in_pairs() -> None:
    """A run without its counterpart is an error."""
    with pytest.raises(ValueError, match="zip"):
        row("m", "s", [1.0, 2.0], [1.0], **ABOUT)


def test_versions_name_what_was_measured() -> None:
    """The machine, Python, this project, and what was asked for."""
    versions = our_versions("torch")
    assert versions.keys() == {"machine", "python", "ediffi", "torch"}
    assert versions["machine"].startswith(f"{os.cpu_count()} x ")
