"""A recipe with stages of a user's own, run as a user would run it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.demo.shapes import write_data_set
from pipelines.planning import plan
from pipelines.recipe_file import load_any_recipe
from pipelines.store.ledger import Ledger
from tests.pipelines import in_process

EXAMPLE = Path(__file__).with_name("example")


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few drawn pictures and their list."""
    return write_data_set(
        tmp_path_factory.mktemp("data"), image_px=16, num_train=96, num_per_held_out=1
    ).parent


@pytest.fixture
def project(data_set: Path, tmp_path: Path) -> Path:
    """A directory of the user's own with recipe and modules."""
    return Path(shutil.copytree(EXAMPLE, tmp_path / "project"))


def overrides(data_set: Path) -> list[str]:
    return [f"data.list={data_set / 'captions.parquet'}", f"data.folder={data_set}"]


def folder(store: Path, stage: str) -> Path:
    """The one finished folder of a stage."""
    (path,) = (manifest.parent for manifest in store.glob(f"{stage}/*/manifest.json"))
    return path


def in_new_process(code: str, project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python as after an edit: what a process has imported stays as it was."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=Path(__file__).resolve().parents[3],
        env={**os.environ, "PROJECT": str(project)},
        capture_output=True,
        text=True,
        check=False,
    )


FINGERPRINTS = """
import json, os, sys
from pipelines.store.ledger import Ledger
from pipelines.planning import plan
from pipelines.recipe_file import load_any_recipe
recipe = load_any_recipe(os.environ["PROJECT"] + "/recipe.yaml", sys.argv[2:])
planned = plan(recipe, Ledger.at(sys.argv[1]))
print(json.dumps({one.name: one.fingerprint for one in planned}))
"""


def fingerprints(project: Path, data_set: Path, *more: str) -> dict[str, str]:
    words = [str(project / "no-store"), *overrides(data_set), *more]
    done = in_new_process(FINGERPRINTS, project, *words)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_stages_of_ones_own_run_beside_ours(project: Path, data_set: Path) -> None:
    """Each runs after what it needs and publishes like any other; what they need not is left."""
    recipe = load_any_recipe(str(project / "recipe.yaml"), overrides(data_set))
    ledger = Ledger.open(project / "store")
    done = in_process.run_recipe(recipe, ledger, selected=["darkest"])
    stages = [name.split("/")[0] for name in done]
    assert list(dict.fromkeys(stages)) == ["ingest", "brightness", "darkest"]
    assert stages.count("brightness") == stages.count("ingest") > 2
    assert len(json.loads((folder(ledger.store, "darkest") / "darkest.json").read_text())) == 3
    planned = {one.name: one for one in plan(recipe, ledger)}
    assert [name for name, one in planned.items() if one.is_hit] == [
        *("ingest", "brightness", "darkest")
    ]
    assert in_process.run_recipe(recipe, ledger, selected=["darkest"]) == []


@pytest.fixture(scope="module")
def unchanged(data_set: Path) -> dict[str, str]:
    """Fingerprints of the example as it is."""
    return fingerprints(EXAMPLE, data_set)


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("brightness_of.py", "/ 255", "/ 256", {"brightness", "darkest"}),
        ("brightness.py", "nsmallest", "nlargest", {"brightness", "darkest"}),
        ("brightness.py", "import heapq", "import heapq  # for the darkest", set()),
        ("recipe.yaml", "num_pictures: 3", "num_pictures: 4", {"darkest"}),
        ("recipe.yaml", "cpus: 0.5", "cpus: 1", set()),
    ],
)
def test_the_fingerprint_knows_the_code(
    project: Path,
    data_set: Path,
    unchanged: dict[str, str],
    file: str,
    old: str,
    new: str,
    changed: set[str],
) -> None:
    """Its module, what that imports, the config: each counts. Comments and resources do not."""
    path = project / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    after = fingerprints(project, data_set)
    assert {name for name in after if unchanged[name] != after[name]} == changed


@pytest.mark.slow
def test_a_real_run_does_them_on_its_workers(project: Path, data_set: Path) -> None:
    """The workers find the module by the recipe's directory, with no word in the environment."""
    words = ["run", str(project / "recipe.yaml"), "darkest", "--json"]
    words += [f"--set={one}" for one in overrides(data_set)]
    result = ediffi(project, words)
    states = {row["name"]: row["state"] for row in result["stages"]}
    assert states == {"ingest": "ran", "brightness": "ran", "darkest": "ran"}
    again = ediffi(project, words)
    assert {row["state"] for row in again["stages"]} == {"cached"}


def ediffi(project: Path, words: Sequence[str]) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RAY_ADDRESS", "PYTHONPATH"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "--store", str(project / "store"), *words],
        cwd=Path(__file__).resolve().parents[3],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
