"""Tests of pipelines.driver.progress: plain lines where nobody watches, bars on a terminal."""

import pytest

from pipelines.driver import progress as module
from pipelines.driver.progress import Progress

ROW = {"images": 12_000, "loss": 0.12345, "images_per_s": 99.6}


def narrate(progress: Progress) -> None:
    """A run of two stages and a half."""
    with progress:
        progress.cached("ingest")
        progress.started("experts", 3, 1)
        progress.update("experts", 1, {"high": ROW})
        progress.update("experts", 2, {"high": ROW})
        progress.finished("experts", 12.34)
        progress.started("assemble", 1, 0)
        progress.failed("assemble")


def test_a_log_file_gets_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off a terminal there is a line an event on stderr, and stdout stays free for data."""
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    narrate(Progress())
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "ingest: cached",
        "experts: 1 of 3 units were done already",
        "experts: 3 units",
        "experts: 1/3 units; high 12,000 images loss 0.123 100/s",
        "experts: done in 12.3 s",
        "assemble: 1 units",
        "assemble: FAILED",
    ]


def test_a_log_file_is_not_flooded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows come every second; lines only after a while, and none about nothing."""
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    clock = iter([100.0, 100.0, 101.0, 100.0 + module.LINE_EVERY_S, 200.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    progress = Progress()
    progress.started("base", 1, 0)
    progress.update("base", 0, {})
    for _ in range(3):
        progress.update("base", 0, {"base": ROW})
    assert capsys.readouterr().err.count("12,000 images") == 2


def test_a_terminal_gets_bars(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal each stage has a bar with its units and what they last reported."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    narrate(Progress())
    err = capsys.readouterr().err
    assert "experts: 1 of 3 units were done already" in err
    assert "3/3" in err
    assert "assemble: FAILED" in err


def test_brackets_in_a_message_are_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Error messages are full of brackets, which rich would take for markup and swallow."""
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    Progress().say("gap [0.5, 0.7) in [bold]words[/bold]")
    assert capsys.readouterr().err == "gap [0.5, 0.7) in [bold]words[/bold]\n"


def test_secrets_are_not_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a unit said when it failed may hold one."""
    monkeypatch.setenv("HF_TOKEN", "hf-very-secret")
    Progress().say("embed/t5/train-3 failed: no hf-very-secret at https://me:s3cr3t@host")
    said = capsys.readouterr().err
    assert said == "embed/t5/train-3 failed: no *** at https://me:***@host\n"
