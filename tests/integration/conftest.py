"""A tiny run of everything, shared by the tests of this folder: each costs a Ray start."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.demo.server import serve_directory
from pipelines.demo.shapes import write_data_set

Json = Any  # what `--json` prints

RECIPE = Path(__file__).with_name("tiny.yaml")
NUM_TRAIN, NUM_HELD_OUT = 96, 24


@dataclass(frozen=True)
class Project:
    """A directory a user works in: the data set, its server, and stores beside them."""

    path: Path
    address: str

    def arguments(self, store: str, *extra: str) -> list[str]:
        settings = {
            "data.list": self.path / "data" / "captions.parquet",
            "data.address_prefix": f"{self.address}/",
        }
        overrides = [f"--set={name}={value}" for name, value in settings.items()]
        return ["run", str(RECIPE), *overrides, "--store", str(self.path / store), *extra]

    def start(self, arguments: Sequence[str]) -> subprocess.Popen[str]:
        """Start `ediffi` as a user would, in a process group of its own."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("RAY_ADDRESS", None)
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *arguments],
            cwd=self.path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, store: str, *extra: str) -> Json:
        """Run the tiny recipe to the end; returns what `--json` printed."""
        process = self.start(self.arguments(store, "--json", *extra))
        output, narration = process.communicate(timeout=600)
        assert process.returncode == 0, narration
        return json.loads(output)

    @staticmethod
    def folder(result: Json, stage: str) -> Path:
        """The folder of one stage of a result."""
        return Path(next(row["path"] for row in result["stages"] if row["name"] == stage))

    @classmethod
    def manifest(cls, result: Json, stage: str) -> Json:
        """The manifest of one stage of a result, with its units' receipts."""
        folder = cls.folder(result, stage)
        units = [
            json.loads(line)["unit"]
            for line in (folder / "receipts.jsonl").read_text().split("\n")[:-1]
        ]
        receipts = [
            json.loads((folder / "receipts" / f"{unit}.json").read_text()) for unit in units
        ]
        return {**json.loads((folder / "manifest.json").read_text()), "receipts": receipts}


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The data set, served on loopback, with a corrupt picture, an empty caption, a dead address
    and a missing file in its list."""
    path = tmp_path_factory.mktemp("project")
    data = path / "data"
    captions_path = write_data_set(data, num_train=NUM_TRAIN, num_per_held_out=1)
    rows = pq.read_table(captions_path).to_pylist()
    picture = (data / rows[0]["url"]).read_bytes()
    (data / "corrupt.png").write_bytes(b"no picture at all")
    (data / "truncated.png").write_bytes(picture[: len(picture) // 2])
    bad = {
        "corrupt": {"url": "corrupt.png"},
        "truncated": {"url": "truncated.png"},
        "gone": {"url": "gone.png"},
        "wordless": {"caption": " "},
        "dead": {"url": f"http://127.0.0.1:{_closed_port()}/picture.png"},
    }
    rows += [{**rows[0], "key": key, **change} for key, change in bad.items()]
    pq.write_table(pa.Table.from_pylist(rows), captions_path)
    with serve_directory(data) as address:
        yield Project(path, address)


@pytest.fixture(scope="session")
def undisturbed(project: Project) -> Json:
    """A run from nothing to the end."""
    return project.run("store")


def _closed_port() -> int:
    """A loopback port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
