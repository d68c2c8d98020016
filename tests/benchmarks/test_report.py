"""Rows in, Markdown out: the benchmark report."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import Row, load_rows, main, render

ROW: dict[str, Any] = {
    "measure": "shard reading",
    "unit": "images/s",
    "ours": 200.0,
    "other": 100.0,
    "other_name": "webdataset",
    "ratio": 2.0,
    "better": "higher",
    "spread": 0.1,
    "runs": 5,
    "command": "python -m benchmarks.shards",
    "versions": {"webdataset": "0.2.111"},
}


def test_page_golden() -> None:
    """One row renders as one table, its command and its versions."""
    page = render({"shards": [Row.from_json(ROW)]})
    assert page.split("\n\n", 2)[2] == (
        "## shards\n\n"
        "| measure | ours | other | other side | ratio | spread | better | runs |\n"
        "|---|--:|--:|---|--:|--:|---|--:|\n"
        "| shard reading | 200 images/s | 100 images/s | webdataset | **2.00** | ±0.10 "
        "| higher | 5 |\n\n"
        "    python -m benchmarks.shards\n\n"
        "webdataset 0.2.111\n"
    )


def test_words_on_a_benchmark_stand_above_its_table() -> None:
    """Also where there are only words: a benchmark that could not be run is not passed over."""
    page = render({"shards": [Row.from_json(ROW)]}, {"shards": "On one core.\n", "gpu": "Not run."})
    assert "## gpu\n\nNot run.\n\n## shards\n\nOn one core.\n\n| measure" in page


def test_page_does_not_depend_on_the_order_of_files() -> None:
    """Sections are sorted by name, whichever file was read first."""
    row = Row.from_json(ROW)
    assert render({"b": [row], "a": [row]}) == render({"a": [row], "b": [row]})


@pytest.mark.parametrize(
    ("better", "ratio", "spread", "wins"),
    [
        ("higher", 1.2, 0.1, True),
        ("higher", 1.05, 0.1, False),
        ("lower", 0.8, 0.1, True),
        ("lower", 0.95, 0.1, False),
        ("lower", 1.2, 0.1, False),
    ],
)
def test_win_needs_more_than_the_spread(
    better: str, ratio: float, spread: float, wins: bool
) -> None:
    """A ratio within the spread of 1 is a tie, on either side."""
    values = {"better": better, "ratio": ratio, "spread": spread, "ours": ratio * 100}
    assert Row.from_json({**ROW, **values}).wins is wins


def test_pipes_in_names_do_not_break_the_table() -> None:
    """A pipe in a measure's name is escaped."""
    page = render({"shards": [Row.from_json({**ROW, "measure": "a|b"})]})
    assert "| a\\|b |" in page


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("ratio", 3.0, "ratio must be ours/other"),
        ("better", "more", "better must be"),
        ("ours", float("nan"), "ours must be finite"),
        ("runs", 0, "runs must be"),
        ("runs", True, "runs must be"),
        ("versions", {}, "versions must name"),
        ("command", "", "command must be text"),
        ("speed", 1, "unknown field 'speed'"),
    ],
)
def test_row_that_cannot_be_true_is_refused(field: str, value: object, words: str) -> None:
    """The error names the field."""
    with pytest.raises(ValueError, match=words):
        Row.from_json({**ROW, field: value})


def test_error_names_file_and_row(tmp_path: Path) -> None:
    """The second row of a file lacks a field: file, row and field are named."""
    path = tmp_path / "shards.json"
    path.write_text(json.dumps([ROW, {k: v for k, v in ROW.items() if k != "unit"}]))
    with pytest.raises(ValueError, match=r"shards\.json: row 1: missing field 'unit'"):
        load_rows(path)


def test_command_writes_the_page(tmp_path: Path) -> None:
    """The command line renders the named files into the named page."""
    rows_path, page_path = tmp_path / "shards.json", tmp_path / "RESULTS.md"
    rows_path.write_text(json.dumps([ROW]))
    assert main([str(rows_path), "--output", str(page_path)]) == 0
    assert page_path.read_text() == render({"shards": [Row.from_json(ROW)]})


def test_command_refuses_broken_rows_and_keeps_the_old_page(tmp_path: Path) -> None:
    """Exit code 2, and nothing is overwritten."""
    rows_path, page_path = tmp_path / "shards.json", tmp_path / "RESULTS.md"
    rows_path.write_text("{}")
    page_path.write_text("old")
    assert main([str(rows_path), "--output", str(page_path)]) == 2
    assert page_path.read_text() == "old"
