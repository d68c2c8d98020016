"""`ediffi submit`, `status`, `logs`, `cancel` and `list`, with jobs on this machine."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.profile import load_profile
from pipelines.commands.submit import placement
from pipelines.jobs.submitted import Jobs
from pipelines.recipe_file import load_any_recipe
from pipelines.run_record import RunRecord
from pipelines.store.ledger import Ledger

Call = Callable[..., tuple[int, str, str]]

# Stands for `ediffi run`: says what it was called with, and stays until it is told to go.
DRIVER = """
import os, pathlib, signal, sys, time
print("driver", *sys.argv[1:], flush=True)
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(3)))
gate = pathlib.Path(sys.argv[0]).with_name("gate")
while not gate.exists():
    time.sleep(0.05)
print("done as", os.environ["EDIFFI_JOB_ID"], os.environ["COLOUR"], flush=True)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A profile of this machine whose program is the stand-in."""
    monkeypatch.setenv("EDIFFI_CACHE", str(tmp_path / "cache"))
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    profile = tmp_path / "here.yaml"
    values = {"kind": "local", "pin": "none", "program": [sys.executable, str(driver)]}
    profile.write_text(yaml.safe_dump(values | {"environment": {"COLOUR": "green"}}))
    return str(profile)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """The file that lets drivers of this test go."""
    return tmp_path / "gate"


@pytest.fixture(autouse=True)
def _no_driver_stays(tmp_path: Path, gate: Path) -> Any:
    """Whatever happens to a test, its driver ends."""
    yield
    if tmp_path.exists():
        gate.touch()


def await_state(ediffi: Call, job_id: str, wanted: str) -> None:
    """Ask until the job stands as wanted."""
    deadline = time.monotonic() + 30
    while (found := json.loads(ediffi("status", job_id, "--json")[1])["job"]["state"]) != wanted:
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def test_a_job_is_submitted_followed_and_over(
    ediffi: Call, ledger: Ledger, place: str, gate: Path
) -> None:
    """It runs a recipe that lies in the store; its words, its state and its place are told."""
    code, out, err = ediffi("submit", "demo", "base", "--cluster", place, "--set", "seed=7")
    job_id = out.strip()
    assert code == 0
    assert f"ediffi logs {job_id} --follow" in err
    await_state(ediffi, job_id, "running")
    folder = ledger.store / "jobs" / job_id
    assert load_any_recipe(str(folder / "recipe.yaml")) == load_any_recipe("demo", ["seed=7"])
    code, out, _ = ediffi("status", job_id)
    assert out.startswith(f"{job_id}  running")
    assert "no run of it has begun" in out
    gate.touch()
    code, out, _ = ediffi("logs", job_id, "--follow")
    assert code == 0
    assert f"driver run {folder}/recipe.yaml base --store {ledger.store}\n" in out
    assert f"done as {job_id} green" in out
    await_state(ediffi, job_id, "finished")
    row = json.loads(ediffi("list", "--json")[1])
    assert (row["kind"], row["id"], row["state"]) == ("job", job_id, "finished")
    assert row["where"] == "here (local)"


def test_the_same_recipe_is_not_submitted_twice(
    ediffi: Call, ledger: Ledger, place: str, gate: Path
) -> None:
    """While its job runs it is that job; afterwards, or with another seed, a new one."""
    first = ediffi("submit", "demo", "--cluster", place)[1].strip()
    code, out, err = ediffi("submit", "demo", "--cluster", place)
    assert (code, out.strip()) == (0, first)
    assert "is there already: nothing was sent" in err
    other = ediffi("submit", "demo", "--cluster", place, "--set", "seed=1")[1].strip()
    assert other.rpartition("-")[0] != first.rpartition("-")[0]
    gate.touch()
    await_state(ediffi, first, "finished")
    again = ediffi("submit", "demo", "--cluster", place)[1].strip()
    assert again == first.removesuffix("-1") + "-2"


def test_a_dry_run_changes_nothing(ediffi: Call, ledger: Ledger, place: str) -> None:
    """It prints what would be sent, and the store stays as it is."""
    before = sorted(ledger.store.rglob("*"))
    code, out, _ = ediffi("submit", "demo", "--cluster", place, "--dry-run")
    assert code == 0
    assert out.startswith("COLOUR=green EDIFFI_JOB_ID=ediffi-demo-")
    assert "/recipe.yaml --store " in out
    told = json.loads(ediffi("submit", "demo", "--cluster", place, "--dry-run", "--json")[1])
    assert told["sent"] == out
    assert sorted(ledger.store.rglob("*")) == before


def test_a_job_can_be_cancelled(ediffi: Call, place: str) -> None:
    """It is asked to save and does; a second time there is nothing to cancel."""
    job_id = ediffi("submit", "demo", "--cluster", place)[1].strip()
    deadline = time.monotonic() + 30
    while "driver" not in ediffi("logs", job_id)[1]:
        assert time.monotonic() < deadline
    code, _, err = ediffi("cancel", job_id)
    assert (code, "asked to save" in err) == (0, True)
    assert "saved" in ediffi("logs", job_id, "--follow")[1]
    await_state(ediffi, job_id, "cancelled")
    code, _, err = ediffi("cancel", job_id)
    assert code == 2
    assert "is over (cancelled): nothing to cancel" in err


def test_a_driver_that_could_not_be_started_leaves_no_job(
    ediffi: Call, ledger: Ledger, tmp_path: Path
) -> None:
    """The next submission begins anew."""
    profile = tmp_path / "far.yaml"
    profile.write_text("kind: ray\nray: {address: 'http://127.0.0.2:9'}\n")
    code, _, err = ediffi("submit", "demo", "--cluster", str(profile))
    assert code == 3
    assert "no Ray dashboard at http://127.0.0.2:9 (profile far)" in err
    assert Jobs(ledger).all() == []


def test_a_scheduler_that_cannot_be_asked_is_told_after_the_store(
    ediffi: Call, ledger: Ledger, place: str, gate: Path
) -> None:
    """What was heard last is printed, then why nothing newer is known; the code is its own."""
    job_id = ediffi("submit", "demo", "--cluster", place)[1].strip()
    path = ledger.store / "jobs" / job_id / "job.json"
    record = json.loads(path.read_text())
    record |= {"kind": "ray", "profile": {"kind": "ray", "ray": {"address": "http://127.0.0.2:9"}}}
    path.write_text(json.dumps(record))
    code, out, err = ediffi("status", job_id)
    assert code == 3
    assert f"{job_id}  waiting when last heard of" in out
    assert "no Ray dashboard at http://127.0.0.2:9" in err
    code, out, err = ediffi("list")
    assert (code, "waiting?" in out) == (3, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cluster", "nowhere"], "no profile 'nowhere': give one of laptop"),
        (["--cluster", "{far}"], r"which profile far does not share (shared_paths: /shared)"),
        (
            ["--cluster", "{far}", "--store", "/shared/s", "--set", "data.list=/me/l.parquet"],
            "data.list: /me/l.parquet is on this machine",
        ),
        (["--cluster", "{groups}"], "node_groups must have a group at least"),
        (["nosuch", "--cluster", "laptop"], "no stage 'nosuch' in this recipe; it has: ingest, "),
    ],
)
def test_what_cannot_work_is_refused_first(
    ediffi: Call, tmp_path: Path, words: list[str], said: str
) -> None:
    """Exit code 2, the field, and what to do."""
    (tmp_path / "far.yaml").write_text(
        "kind: ray\nshared_paths: [/shared]\nray: {address: 'http://10.0.0.5:8265'}\n"
    )
    (tmp_path / "groups.yaml").write_text("kind: slurm\nslurm: {directory: /shared}\n")
    paths = {"far": tmp_path / "far.yaml", "groups": tmp_path / "groups.yaml"}
    code, out, err = ediffi("submit", "demo", *(word.format(**paths) for word in words))
    assert (code, out) == (2, "")
    assert said in err


def test_a_profile_places_stages(ediffi: Call, tmp_path: Path) -> None:
    """Its groups reach the recipe that travels, unless the user says otherwise."""
    profile = tmp_path / "k8s.yaml"
    profile.write_text(
        "kind: kuberay\nimage: x:1\nstore: s3://bucket/store\nstages: {base: gpu, experts: gpu}\n"
        "node_groups: {gpu: {cpus_per_node: 8, memory_per_node_gib: 32}}\nkuberay:\n"
    )
    recipe = load_any_recipe(
        "demo", [*placement(load_profile(str(profile))), "resources.experts.node_group=cpu"]
    )
    assert recipe.resources_of("base").node_group == "gpu"
    assert recipe.resources_of("experts").node_group == "cpu"
    assert recipe.resources_of("ingest").node_group == ""


def test_a_run_belongs_to_its_job(ediffi: Call, ledger: Ledger, place: str) -> None:
    """The job's status shows the run, and the run's name leads to the job."""
    job_id = ediffi("submit", "demo", "--cluster", place)[1].strip()
    recipe = load_any_recipe("demo").model_dump(mode="json")
    record = RunRecord(recipe="demo", resolved=recipe, state="finished", job=job_id)
    ledger.write_run(vars(record))
    out = ediffi("status", job_id)[1]
    assert f"{record.run_id}  finished" in out
    told = json.loads(ediffi("status", record.run_id, "--json")[1])
    assert told["run_id"] == record.run_id
    assert told["job"]["job_id"] == job_id


def test_units_of_a_run_are_heard(ediffi: Call, ledger: Ledger) -> None:
    """All that they said, or what one unit did; a unit that said nothing is told."""
    record = RunRecord(recipe="demo", resolved={}, state="finished")
    ledger.write_run(vars(record))
    for name in (
        "ingest/train-00000.1.log",
        "embed/t5/train-00000.1.log",
        "embed/t5/train-00000.2.log",
    ):
        path = ledger.store / "logs" / record.run_id / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"words of {name}\n")
    assert ediffi("logs", record.run_id)[1].count("words of") == 3
    out = ediffi("logs", record.run_id, "--unit", "embed/t5/train-00000")[1]
    assert out.count("words of") == 2
    assert "== embed/t5/train-00000, attempt 2" in out
    code, _, err = ediffi("logs", record.run_id, "--unit", "embed/t6")
    assert (code, f"run {record.run_id} has no log of embed/t6" in err) == (2, True)


def test_a_run_by_hand_can_be_cancelled(ediffi: Call, ledger: Ledger) -> None:
    """On its own machine, by SIGTERM; from another one the error says where it runs."""
    code = (
        "import signal, sys, time\n"
        "from pipelines.store.ledger import Ledger\n"
        "from pipelines.run_record import RunRecord\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n"
        "record = RunRecord(recipe='demo', resolved={})\n"
        f"Ledger.open({str(ledger.store)!r}).write_run(vars(record))\n"
        "print(record.run_id, flush=True); time.sleep(60)"
    )
    root = Path(__file__).parents[3]
    driver = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert driver.stdout is not None
    run_id = driver.stdout.readline().strip()
    assert ediffi("cancel", run_id)[0] == 0
    assert driver.wait(30) == 3
    driver.stdout.close()
    code_, _, err = ediffi("cancel", run_id)
    assert (code_, "is over (killed)" in err) == (2, True)
    far = RunRecord(recipe="far", resolved={}, host="elsewhere", pid=7)
    ledger.write_run(vars(far))
    code_, _, err = ediffi("cancel", far.run_id)
    assert code_ == 2
    assert "on elsewhere as process 7" in err or "is over" in err


def test_a_name_that_stands_for_nothing_or_too_much(ediffi: Call, ledger: Ledger) -> None:
    """The newest of those that exist are named."""
    for recipe in ("demo", "demo"):
        ledger.write_run(vars(RunRecord(recipe=recipe, resolved={}, state="finished")))
    for name, words in (("demo", "2 jobs and runs in"), ("zzz", "no job and no run in")):
        code, _, err = ediffi("status", name)
        assert code == 2
        assert words in err
        assert "newest: demo-" in err
