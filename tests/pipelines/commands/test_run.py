"""Tests of pipelines.commands.run: what a person, or a program with --json, reads on stdout."""

import errno
import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from pipelines.errors import RetryableError, StageFailed
from pipelines.planning import PlannedStage, describe, plan
from pipelines.recipe import Recipe
from pipelines.stage import Outcome, Unit
from pipelines.store.ledger import Ledger
from pipelines.store.processes import process_start, process_table
from pipelines.workflow import run_recipe
from tests.pipelines.fake_stages import FakeStage, finish, write_run

FIGURES = {"ensemble/text_alignment": 0.9, "base/text_alignment": 0.5, "base/loss": 0.25}


@pytest.fixture
def planned(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> dict[str, PlannedStage]:
    """Three stages in the store: one with files, one named with a slash, and a report."""
    use_stages(
        FakeStage(name="ingest"),
        FakeStage(name="embed/t5", needs=("ingest",)),
        FakeStage(name="report", needs=("ingest",)),
    )
    planned = {one.name: one for one in plan(demo_recipe, ledger)}
    finish(planned["ingest"], {"a": {"a.tar": "aaaa"}, "b": {"b.tar": "bb"}})
    finish(planned["embed/t5"])
    report = planned["report"]
    record, inputs = report.record, report.inputs
    identity = describe(report.stage, inputs)
    contents = {"ingest": planned["ingest"].record.manifest().contents}
    record.open(identity, contents)
    outcome = Outcome(facts={"metrics": FIGURES})
    record.publish(Unit(id="report"), outcome, ledger.new_scratch(), seconds=1, attempt=1)
    record.complete("report", identity, inputs, contents, ["report"], "run-1")
    return planned


def rows(*planned: PlannedStage, state: str = "ran") -> list[dict[str, Any]]:
    """Stages as a run's record has them."""
    return [
        {
            "name": one.name,
            "fingerprint": one.fingerprint,
            "state": state,
            "seconds": 2.0,
            "units": 2,
            "path": str(one.record.directory),
        }
        for one in planned
    ]


def test_run_tells_programs_where_everything_lies(
    ediffi: Callable[..., tuple], ledger: Ledger, planned: Any
) -> None:
    """A run that finds everything prints the object that a run that did the work prints."""
    code, out, _ = ediffi("run", "demo", "--json", "--set", "seed=1")
    document = json.loads(out)
    assert (code, document["store"]) == (0, str(ledger.store))
    assert document["run_id"] == ledger.runs()[0]["run_id"]
    assert [row["state"] for row in document["stages"]] == ["cached"] * 3
    assert document["ensemble"] == ""
    assert ledger.runs()[0]["resolved"]["base"]["seed"] == 1


def test_run_tells_people_what_came_out(
    ediffi: Callable[..., tuple],
    planned: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stages, the figures of the report, and where MLflow is, without its password."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host:5000")
    _, out, _ = ediffi("run", "demo", "ingest", "report")
    assert [line.split()[:2] for line in out.splitlines()[:2]] == [
        ["ingest", "cached"],
        ["report", "cached"],
    ]
    assert "text alignment     base 0.500, ensemble 0.900" in out
    assert "held-out loss      base 0.250" in out
    assert f"report             {planned['report'].record.directory / 'report.html'}" in out
    assert "MLflow             http://me:***@host:5000" in out


def test_a_failed_run_still_tells_programs_what_is_there(
    ediffi: Callable[..., tuple],
    ledger: Ledger,
    planned: dict[str, PlannedStage],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """stdout has the object, stderr the reason, the exit code says failed."""

    def fail(*_: Any, **__: Any) -> None:
        error = StageFailed("stage embed/t5: 1 of 2 units failed")
        error.record = write_run(
            ledger, "demo-1", state="failed", stages=rows(planned["ingest"]), started="2026-01-01"
        )
        raise error

    write_run(ledger, "another", started="2026-01-02")  # of a driver beside ours
    monkeypatch.setattr("pipelines.workflow.run_recipe", fail)
    code, out, err = ediffi("run", "demo", "--json")
    assert code == 1
    assert json.loads(out)["run_id"] == "demo-1"
    assert [row["name"] for row in json.loads(out)["stages"]] == ["ingest"]
    assert err == "ediffi: stage embed/t5: 1 of 2 units failed\n"


def test_a_run_that_never_began_tells_programs_nothing(
    ediffi: Callable[..., tuple],
    ledger: Ledger,
    planned: dict[str, PlannedStage],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The code and stderr say it; nothing of another run stands on stdout."""

    def fail(*_: Any, **__: Any) -> None:
        raise RetryableError("no room")

    monkeypatch.setattr("pipelines.workflow.run_recipe", fail)
    assert ediffi("run", "demo", "--json") == (3, "", "ediffi: no room\n")


def test_an_error_of_a_run_has_its_record(
    ledger: Ledger, demo_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of that run, whatever else is in the store."""

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr("pipelines.workflow.plan", fail)
    with pytest.raises(RetryableError) as caught:
        run_recipe(demo_recipe, ledger)
    assert caught.value.record == ledger.runs()[0]


def test_status_tells_the_newest_run(
    ediffi: Callable[..., tuple], ledger: Ledger, demo_recipe: Recipe, planned: Any
) -> None:
    """What is complete and what is missing, from the store alone."""
    resolved = demo_recipe.model_dump(mode="json")
    write_run(ledger, "demo-1", started="2026-01-01", resolved=resolved)
    addresses = {name: one.fingerprint for name, one in planned.items()} | {"mine": "0" * 16}
    failed = {"state": "failed", "error": "stage ingest: it broke", "planned": addresses}
    write_run(ledger, "demo-2", started="2026-01-02", **failed)
    code, out, _ = ediffi("status")
    lines = out.splitlines()
    assert (code, lines[0]) == (0, "demo-2  failed  started 2026-01-02")
    assert {line.split()[0]: " ".join(line.split()[1:]) for line in lines[1:-1]} == {
        **dict.fromkeys(planned, "complete"),
        "mine": "not begun, or none of its units is done",
    }
    assert lines[-1] == "stage ingest: it broke"
    assert json.loads(ediffi("status", "demo-1", "--json")[1])["run_id"] == "demo-1"


def test_cancel_tells_nobody_else(ediffi: Callable[..., tuple], ledger: Ledger) -> None:
    """A process of the driver's number that is not the driver, here or in another table, stays."""
    with subprocess.Popen(["sleep", "60"]) as stranger:
        table = {"process_table": "another boot", "process_started": process_start(stranger.pid)}
        write_run(ledger, "demo-1", state="running", pid=stranger.pid, **table)
        code, _, err = ediffi("cancel", "demo-1")
        assert code == 2
        assert f"as process {stranger.pid}, and no scheduler to ask: send it SIGTERM there" in err
        assert stranger.poll() is None
        stranger.kill()


def test_status_sees_that_the_driver_is_gone(ediffi: Callable[..., tuple], ledger: Ledger) -> None:
    """A run that was killed cannot say so itself."""
    gone = {"process_started": 1.0, "process_table": process_table()}
    write_run(ledger, "demo-1", state="running", **gone)
    assert json.loads(ediffi("status", "--json")[1])["state"] == "killed"


def test_compare_shows_what_differs_and_what_came_of_it(
    ediffi: Callable[..., tuple], ledger: Ledger, planned: dict[str, PlannedStage]
) -> None:
    """Equal settings are left out; a run without a report has no figures."""
    stages = rows(planned["report"])
    write_run(ledger, "run-a", resolved={"lr": 1, "px": 16}, stages=stages, seconds=5.0)
    write_run(ledger, "run-b", resolved={"lr": 2, "px": 16, "new": True}, seconds=6.0)
    code, out, _ = ediffi("compare", "run-a", "run-b", "--json")
    assert code == 0
    found = json.loads(out)
    costs = {name: found["figures"].pop(name) for name in list(found["figures"]) if "cost/" in name}
    assert costs["cost/device_hours_gpu"] == [0.0, 0.0]
    assert costs["cost/device_hours_cpu"][0] > costs["cost/device_hours_cpu"][1] == 0.0
    assert found == {
        "runs": ["run-a", "run-b"],
        "settings": {"lr": [1, 2], "new": ["absent", True]},
        "figures": {name: [FIGURES[name], None] for name in FIGURES} | {"seconds": [5.0, 6.0]},
    }
    _, out, _ = ediffi("compare", "run-a", "run-b")
    table = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:]}
    assert table["lr"] == ["1", "2"]
    assert table["base/loss"] == ["0.2500", "None"]
    assert "px" not in table


def test_encoders_need_something_to_fit(ediffi: Callable[..., tuple]) -> None:
    """A recipe whose encoders are all pretrained has nothing to fit, and says so."""
    pretrained = [f"--set=encoders.{name}.weights=openai" for name in ("clip_text", "clip_image")]
    code, _, err = ediffi("encoders", "fit", "demo", "--set", "clip_fit=null", *pretrained)
    assert code == 2
    assert "has no `clip_fit:` section" in err
