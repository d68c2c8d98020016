"""Kill the driver at several moments; the same command must finish as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DEADLINE_S = 300


def test_sigkill_of_the_driver_costs_nothing_finished(project: Any, undisturbed: Any) -> None:
    """Killed while embedding, training the base and fine-tuning, a run ends with equal bytes."""
    store = project.path / "killed"
    moments: dict[str, Callable[[], bool]] = {
        "embed": lambda: any(store.glob("embed/*/*/receipts/*.json")),
        "base": lambda: any(store.glob("base/*/durable/base/checkpoints/images-*/complete.json")),
        "experts": lambda: any(store.glob("experts/*/durable/*/progress.jsonl")),
    }
    for moment, has_come in moments.items():
        process = project.start(project.arguments("killed"))
        _wait_until(has_come, process, moment)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    done_before = dict(_receipts(store))
    result = project.run("killed")
    assert {path: stat for path, stat in _receipts(store) if path in done_before} == done_before
    base = project.manifest(result, "base")["receipts"][0]
    assert base["timings"]["resumed_from_images"] > 0
    for stage in ("ingest", "clip_fit", "embed/t5", "embed/clip_image"):
        names = ("manifest.json", "receipts.jsonl")
        ours, theirs = (project.folder(one, stage) for one in (result, undisturbed))
        assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in names)
    for stage in ("base", "experts", "sample"):
        assert _digests(project.manifest(result, stage)) == _digests(
            project.manifest(undisturbed, stage)
        ), stage
    assert _killed_runs(store) == 3


def _wait_until(has_come: Callable[[], bool], process: subprocess.Popen[str], moment: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not has_come():
        assert process.poll() is None, f"{moment}: the run ended: {process.communicate()[1]}"
        assert time.monotonic() < deadline, f"{moment} did not come in {DEADLINE_S} s"
        time.sleep(0.05)


def _receipts(store: Path) -> Iterator[tuple[Path, tuple[int, int]]]:
    """Every receipt with its inode and time: a unit done again would have new ones."""
    for path in store.rglob("receipts/*.json"):
        stat = path.stat()
        yield path, (stat.st_ino, stat.st_mtime_ns)


def _digests(manifest: Any) -> dict[str, str]:
    return {
        file["path"]: file["sha256"]
        for receipt in manifest["receipts"]
        for file in receipt["files"]
    }


def _killed_runs(store: Path) -> int:
    from pipelines.ledger import Ledger

    return sum(record["state"] == "killed" for record in Ledger(store).runs())
