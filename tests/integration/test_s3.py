"""The data plane on a real HTTP server that speaks S3: tars and caches in a bucket, read back."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from PIL import Image

from ediffi.caches import open_caches
from ediffi.shards import JoinedShards
from ediffi.storage.shard_format import ShardWriter
from pipelines.cli import build_parser
from pipelines.commands.embed import recipe_of
from pipelines.planning import plan
from pipelines.store.ledger import Ledger
from pipelines.worker.execute import Task, execute
from tests.tiny_encoders import write_t5

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

COLOURS = ("red", "green", "blue", "grey", "black", "white")


def ediffi(*arguments: str, cwd: Path) -> Any:
    """Run the command line as a user would; returns what `--json` printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "EDIFFI_CACHE": str(cwd / "cache")}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments, "--json"],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def write_shards(folder: Path) -> None:
    """Two tars of three pictures; one sample of the second is truncated."""
    folder.mkdir()
    for shard_index in range(2):
        with ShardWriter(folder / f"{shard_index:05d}.tar") as writer:
            for index in range(3 * shard_index, 3 * shard_index + 3):
                stream = io.BytesIO()
                Image.new("RGB", (8, 8), COLOURS[index]).save(stream, "PNG")
                png = stream.getvalue()[: 40 if index == 4 else None]
                caption = f"{COLOURS[index]} disk on paper"
                writer.write(f"{index:03d}", {"png": png, "txt": caption.encode()})


def paths(result: Any) -> dict[str, str]:
    """Folder of every stage."""
    return {row["name"]: row["path"] for row in result["stages"]}


def embed_here(path: Path, encoders: list[str]) -> Path:
    """The same caches of the same tars in a local store, unit by unit in this process."""
    options = build_parser().parse_args(["embed", f"{path}/shards/*.tar", *encoders])
    ledger = Ledger.open(path / "store")
    for one in plan(recipe_of(options), ledger):
        inputs = {name: ledger.stage(name, at).manifest() for name, at in one.inputs.items()}
        units = list(one.stage.plan(inputs))
        one.record.open({}, {})
        for unit in units:
            task = Task(
                store=str(ledger.store),
                stage=one.stage,
                fingerprint=one.fingerprint,
                inputs=one.inputs,
                unit=unit,
            )
            execute(task)
        one.record.complete(one.name, {}, one.inputs, {}, [unit.id for unit in units], "run")
    return ledger.store / one.name / one.fingerprint


def test_caches_are_made_and_read_on_a_bucket(
    s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are those of a local store; the second command finds all; everything verifies."""
    monkeypatch.setenv("EDIFFI_CACHE", str(tmp_path / "cache"))
    write_t5(tmp_path / "t5", (*COLOURS, "disk", "on", "paper"))
    write_shards(tmp_path / "shards")
    bucket = fsspec.filesystem("s3")
    bucket.put(str(tmp_path / "shards"), f"{s3_store}/shards", recursive=True)
    encoders = [
        f"--encoder=t5=transformers:{tmp_path}/t5,max_tokens=12",
        "--max-rejects-fraction=0.2",
    ]
    command = ["embed", f"{s3_store}/shards/*.tar", *encoders, "--store", f"{s3_store}/store"]
    (result,) = ediffi(*command, cwd=tmp_path)
    assert {row["state"] for row in result["stages"]} == {"ran"}
    (again,) = ediffi(*command, cwd=tmp_path)
    assert {row["state"] for row in again["stages"]} == {"cached"}

    verified = ediffi("cache", "verify", "--store", f"{s3_store}/store", cwd=tmp_path)
    assert len(verified) == 2
    assert all(not row["problems"] for row in verified)

    here = embed_here(tmp_path, encoders)
    for shard in ("train-00000.tar", "train-00001.tar"):
        there = bucket.cat(f"{paths(result)['embed/t5']}/{shard}")
        assert there == (here / shard).read_bytes()

    folders = paths(result)
    shards = open_caches(folders["ingest"], {"t5": folders["embed/t5"]})
    samples = JoinedShards(shards, image_px=8)
    assert [samples[index].key for index in range(len(samples))] == [
        "000",
        "001",
        "002",
        "003",
        "005",
    ]
    assert samples[0].streams["t5"]["tokens"].dtype == torch.bfloat16
    samples.close()
