"""Kill driver and workers at many moments; the same command finishes as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.worker.durable import read_progress

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DEADLINE_S = 300
STOPPED = "stopped as asked after "  # so many images
MOST_ROWS = 10  # a kill comes within so many rows of training's log


def test_kills_cost_nothing_finished(project: Any, undisturbed: Any) -> None:
    """Driver and workers are killed while embedding and training; the bytes come out equal.

    Training is hit after random numbers of rows: a worker twice by SIGKILL, the driver once by
    SIGTERM, upon which training saves, and once by SIGKILL.
    """
    store, chance = project.path / "killed", random.Random(4)
    process = project.start(project.arguments("killed"))
    _wait_until(lambda: any(store.glob("embed/*/*/receipts/*.json")), process, "embed")
    _kill(process)

    process = project.start(project.arguments("killed"))
    for _ in range(2):
        _wait_for_rows(store, "base", chance.randint(2, MOST_ROWS), process)
        os.kill(_worker_of(process), signal.SIGKILL)
    _wait_for_rows(store, "base", chance.randint(2, MOST_ROWS), process)
    saved_images = _end(process)
    assert _newest_checkpoint(store).name == f"images-{saved_images:010d}"

    process = project.start(project.arguments("killed"))
    _wait_for_rows(store, "base", chance.randint(1, MOST_ROWS), process)
    _kill(process)

    process = project.start(project.arguments("killed"))
    _wait_for_rows(store, "experts", 1, process)
    _kill(process)

    done_before = dict(_receipts(store))
    result = project.run("killed")
    assert {path: stat for path, stat in _receipts(store) if path in done_before} == done_before
    base = project.manifest(result, "base")["receipts"][0]
    assert base["timings"]["resumed_from_images"] >= saved_images
    for stage in ("ingest", "clip_fit", "embed/t5", "embed/clip_image", "base", "experts"):
        names = ("manifest.json", "receipts.jsonl")
        ours, theirs = (project.folder(one, stage) for one in (result, undisturbed))
        assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in names)
    for stage in ("base", "experts", "sample"):
        assert _digests(project.manifest(result, stage)) == _digests(
            project.manifest(undisturbed, stage)
        ), stage
    assert _run_states(store) == ["finished", "killed", "killed", "stopped", "killed"]


def test_a_gang_that_loses_a_worker_goes_on_as_one(project: Any, undisturbed: Any) -> None:
    """A rank gets SIGTERM, as when its node is taken away: both save; one process goes on.

    Its losses are an undisturbed run's; the row in whose midst the gang ended is told for the rest
    of its images alone.
    """
    store = project.path / "store"
    settings = ("base", "--set=base.total_images=1280")
    gang = (*settings, "--set=resources.base.num_workers=2")
    process = project.start(project.arguments("store", *gang))
    _wait_for_rows(store, "base", random.Random(5).randint(1, MOST_ROWS), process)
    os.kill(_worker_of(process, "ray::RayTrainWorker"), signal.SIGTERM)
    saved_images = _images_saved(next(line for line in process.stderr if STOPPED in line))
    _kill(process)  # it was about to gather another gang
    assert 0 < saved_images < 1280

    result = project.run("store", *settings)
    receipt = project.manifest(result, "base")["receipts"][0]
    assert receipt["timings"]["resumed_from_images"] == saved_images
    alone, both = (_losses(one) for one in (undisturbed, result))
    cut = next(images for images in both if images > saved_images)
    whole = [images for images in both if images != cut or cut - saved_images == 64]
    assert max(whole) == 1280
    assert [both[images] for images in whole] == pytest.approx(
        [alone[images] for images in whole], rel=1e-3
    )


def _wait_until(has_come: Callable[[], bool], process: subprocess.Popen[str], moment: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not has_come():
        assert process.poll() is None, f"{moment}: the run ended: {process.communicate()[1]}"
        assert time.monotonic() < deadline, f"{moment} did not come in {DEADLINE_S} s"
        time.sleep(0.02)


def _wait_for_rows(store: Path, stage: str, num_rows: int, process: subprocess.Popen[str]) -> None:
    """Wait until an unfinished stage has reported so many rows more than it has now."""
    before = _num_rows(store, stage)
    moment = f"{num_rows} more rows of {stage}"
    _wait_until(lambda: _num_rows(store, stage) >= before + num_rows, process, moment)


def _num_rows(store: Path, stage: str) -> int:
    return sum(
        path.read_text().count("\n")
        for path in store.glob(f"{stage}/*/durable/*/progress.jsonl")
        if not (path.parents[2] / "manifest.json").exists()
    )


def _worker_of(process: subprocess.Popen[str], title: str = "ray::UnitWorker.run") -> int:
    """A process that does a unit."""
    for one in psutil.Process(process.pid).children(recursive=True):
        if "".join(one.cmdline()[:1]).startswith(title):
            return one.pid
    raise AssertionError("no worker is doing a unit")


def _kill(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def _end(process: subprocess.Popen[str]) -> int:
    """Tell the driver to end; images seen by the checkpoint that training left."""
    os.kill(process.pid, signal.SIGTERM)
    narration = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == 3, narration
    (line,) = (line for line in narration.splitlines() if STOPPED in line)
    return _images_saved(line)


def _images_saved(line: str) -> int:
    """What the driver says of a unit that was told to end."""
    return int(line.split(STOPPED)[1].split()[0])


def _newest_checkpoint(store: Path) -> Path:
    return max(store.glob("base/*/durable/base/checkpoints/images-*/complete.json")).parent


def _losses(result: Any) -> dict[int, float]:
    """Training loss of the base by images seen."""
    row = next(row for row in result["stages"] if row["name"] == "base")
    return {
        int(one["images"]): one["loss"]
        for one in read_progress(Path(row["path"]) / "durable" / "base")
    }


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


def _run_states(store: Path) -> list[str]:
    """How the store's runs ended, the newest first."""
    from pipelines.store.ledger import Ledger

    return [record["state"] for record in Ledger(store).runs()]
