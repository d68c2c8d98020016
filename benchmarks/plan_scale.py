"""How the orchestrator bears very many shards: time and memory of `plan`, memory of `embed`.

`python -m benchmarks.plan_scale [--quick] [--json FILE]`

A store is simulated: receipts and manifests of the real format, without the shards they speak of.
`ediffi plan` runs on it as a process of its own, measured whole: start of the interpreter, reading
the recipe, and deciding for every unit of three encoders whether it is kept (the first encoder is
half done), taken over from an earlier fingerprint (the second was finished before one caption in a
hundred shards changed), or to do (the third is new). `ediffi embed` runs for real, over receipts
that all name one small shard, and its driver's and its workers' peak memory are read meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from benchmarks.interleave import our_versions, row, write_rows
from benchmarks.report import Row
from benchmarks.simulated_store import (
    SMALL_SHARD_SAMPLES,
    Scene,
    ingest_receipts,
    make_store,
    num_changed,
    write_stage,
)
from pipelines.stage import File, Json
from pipelines.store.fingerprint import file_sha256

COMMAND = "python -m benchmarks.plan_scale"
LIMIT_S, LIMIT_MB = 10.0, 1000.0
BYTES_PER_MB = 1e6
POLL_S = 0.2


# -- plan -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What one process took."""

    seconds: float
    peak_mb: float


def measure_plan(scene: Scene, num_shards: int) -> Taken:
    """Run `ediffi plan` as a user does. Raises RuntimeError if it says something wrong."""
    command = [sys.executable, "-m", "pipelines.cli", "--store", str(scene.ledger.store)]
    start = time.monotonic()
    process = subprocess.Popen(
        [*command, "plan", str(scene.recipe_path), "--json"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"plan ended with {process.returncode}")
    _check_plan(json.loads(output), num_shards)
    return Taken(seconds=seconds, peak_mb=usage.ru_maxrss * 1024 / BYTES_PER_MB)


def _check_plan(document: Json, num_shards: int) -> None:
    changed = num_changed(num_shards)
    expected = {
        "embed/half": (num_shards // 2, 0, num_shards + 1 - num_shards // 2),
        "embed/before": (0, num_shards + 1 - changed, changed),
        "embed/new": (0, 0, num_shards + 1),
    }
    for stage in document["stages"][1:]:
        units = stage["units"]
        found = (units["kept"], units["taken_over"], units["to_do"])
        if found != expected[stage["name"]]:
            raise RuntimeError(f"{stage['name']}: {found}, expected {expected[stage['name']]}")


# -- embed ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peaks of an `ediffi embed`: its driver, and the largest of its workers."""

    driver_mb: float
    worker_mb: float


def measure_embed(folder: Path, num_shards: int) -> Memory:
    """Encode one small shard `num_shards` times over, under as many names."""
    scene = Scene.make(folder, {"mini": 16})
    write_stage(scene.stages()["ingest"], ingest_receipts(num_shards, _small_shard(folder)), {})
    command = [sys.executable, "-m", "pipelines.cli", "--store", str(scene.ledger.store)]
    process = subprocess.Popen(
        [*command, "embed", "--recipe", str(scene.recipe_path), "--json"],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    driver_bytes = worker_bytes = 0
    while process.poll() is None:
        driver_bytes = max(driver_bytes, _resident_bytes(process.pid))
        for child in _workers(process.pid):
            worker_bytes = max(worker_bytes, _resident_bytes(child))
        time.sleep(POLL_S)
    if process.returncode != 0:
        raise RuntimeError(f"embed of {num_shards} shards ended with {process.returncode}")
    return Memory(driver_mb=driver_bytes / BYTES_PER_MB, worker_mb=worker_bytes / BYTES_PER_MB)


def _small_shard(folder: Path) -> File:
    from ediffi.storage.shard_format import ShardWriter

    path = folder / "small.tar"
    with ShardWriter(path) as writer:
        for index in range(SMALL_SHARD_SAMPLES):
            writer.write(f"{index:09d}", {"txt": f"a picture of {index} things".encode()})
    sha256, num_bytes = file_sha256(path), path.stat().st_size
    return File(path=str(path), sha256=sha256, num_bytes=num_bytes)


def _workers(driver: int) -> list[int]:
    """Processes of the driver's Ray that do units."""
    try:
        children = psutil.Process(driver).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    found = []
    for child in children:
        try:
            if "UnitWorker" in " ".join(child.cmdline()):
                found.append(child.pid)
        except psutil.Error:  # it has just ended
            continue
    return found


def _resident_bytes(pid: int) -> int:
    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.Error:  # it has just ended
        return 0


# -- rows -----------------------------------------------------------------------------------------


def measure(plan_shards: Sequence[int], embed_shards: tuple[int, int], runs: int) -> list[Row]:
    """Rows for both parts."""
    versions = our_versions("ray")
    rows = []
    for num_shards in plan_shards:
        with TemporaryDirectory(prefix="ediffi-plan-scale-") as folder:
            scene = make_store(Path(folder), num_shards)
            taken = [measure_plan(scene, num_shards) for _ in range(runs)]
        name = f"plan of {num_shards:,} shards and 3 encoders"
        for what, unit, ours, limit in (
            ("whole process", "s", [one.seconds for one in taken], LIMIT_S),
            ("peak memory", "MB", [one.peak_mb for one in taken], LIMIT_MB),
        ):
            rows.append(
                row(
                    f"{name}, {what}",
                    unit,
                    ours,
                    [limit] * runs,
                    other_name="the most it may take",
                    better="lower",
                    command=COMMAND,
                    versions=versions,
                )
            )
    return [*rows, *_embed_rows(embed_shards, versions)]


def _embed_rows(embed_shards: tuple[int, int], versions: Mapping[str, str]) -> list[Row]:
    few, many = embed_shards
    found = {}
    for num_shards in (few, many):
        with TemporaryDirectory(prefix="ediffi-embed-scale-") as folder:
            found[num_shards] = measure_embed(Path(folder), num_shards)
            print(f"embed of {num_shards:,} shards: {found[num_shards]}", file=sys.stderr)
    return [
        row(
            f"embed of {many:,} shards, peak memory of the {who}",
            "MB",
            [getattr(found[many], f"{who}_mb")],
            [getattr(found[few], f"{who}_mb")],
            other_name=f"{few:,} shards",
            better="lower",
            command=COMMAND,
            versions=versions,
        )
        for who in ("driver", "worker")
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the rows; `--json` writes them to a file."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the shards, one run")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(arguments)
    if options.quick:
        rows = measure((1000,), (20, 60), 1)
    else:
        rows = measure((1000, 100_000), (100, 10_000), 5)
    write_rows(rows, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
