"""Tests of pipelines.workflow: the record of a run, whichever way the run ends."""

import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest

from pipelines.driver.runner import Runner
from pipelines.errors import RetryableError, StageFailed, UserError
from pipelines.planning import plan
from pipelines.recipe import Recipe, Resources
from pipelines.run_record import RunRecord, close_orphans
from pipelines.store import lease, pulse
from pipelines.store.lease import Lease
from pipelines.store.ledger import Ledger
from pipelines.store.processes import Owner, process_table
from pipelines.store.stopping import StopMark
from pipelines.workflow import run_recipe, select
from tests.pipelines.fake_stages import FakeStage, finish_all, write_run


@pytest.fixture
def recipe(demo_recipe: Recipe) -> Recipe:
    """The demo recipe with one attempt a unit."""
    once = Resources(attempts=1)
    return demo_recipe.model_copy(update={"resources": {"first": once, "second": once}})


@pytest.fixture
def tracker(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> Mock:
    """A run uses the session's Ray, and this in MLflow's place."""
    tracker = Mock(parent_run_id="mlflow-1", errors=[])
    monkeypatch.setattr("pipelines.tracking.tracker.Tracker", Mock(return_value=tracker))
    monkeypatch.setattr("pipelines.driver.ray_cluster.connect", lambda: None)
    monkeypatch.setattr("pipelines.driver.ray_cluster.disconnect", lambda: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    return tracker


def stages(**behaviour: str) -> list[FakeStage]:
    """A stage and one that needs it."""
    return [
        FakeStage(name="first", units=("a", "b"), behaviour=behaviour),
        FakeStage(name="second", needs=("first",)),
    ]


def test_a_finished_run_leaves_a_record(
    recipe: Recipe, ledger: Ledger, tracker: Mock, use_stages: Callable[..., None]
) -> None:
    """What was asked for, what was done and where it lies; the tracker's password is not in it."""
    use_stages(*stages())
    record = run_recipe(recipe, ledger)
    assert ledger.runs() == [vars(record)]
    assert record.state == "finished"
    assert record.ended > record.started
    assert record.resolved == recipe.model_dump(mode="json")
    assert record.mlflow_run_id == "mlflow-1"
    assert record.tracking_uri == "http://me:***@127.0.0.1:9"
    assert [(row["name"], row["state"], row["units"]) for row in record.stages] == [
        ("first", "ran", 2),
        ("second", "ran", 1),
    ]
    assert all(row["path"].startswith(str(ledger.store)) for row in record.stages)
    tracker.run_finished.assert_called_once_with("FINISHED")


def test_a_run_that_finds_everything_starts_nothing(
    recipe: Recipe,
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    use_stages: Callable[..., None],
) -> None:
    """Neither Ray nor MLflow is touched, and the record says that all was there."""
    use_stages(*stages())
    finish_all(plan(recipe, ledger))
    monkeypatch.setattr("pipelines.driver.ray_cluster.connect", Mock(side_effect=AssertionError))
    monkeypatch.setattr("pipelines.tracking.tracker.Tracker", Mock(side_effect=AssertionError))
    record = run_recipe(recipe, ledger)
    assert record.state == "finished"
    assert {row["state"] for row in record.stages} == {"cached"}
    assert ledger.run(record.run_id)["stages"] == record.stages


def test_a_failed_run_says_why(
    recipe: Recipe, ledger: Ledger, tracker: Mock, use_stages: Callable[..., None]
) -> None:
    """The error is raised and kept; stages that were never reached are not in the record."""
    use_stages(*stages(b="fails"))
    with pytest.raises(StageFailed, match="b is broken"):
        run_recipe(recipe, ledger)
    (record,) = ledger.runs()
    assert record["state"] == "failed"
    assert "first: 1 of 2 units failed" in record["error"]
    assert [(row["name"], row["state"]) for row in record["stages"]] == [("first", "failed")]
    tracker.run_finished.assert_called_once_with("FAILED")


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGTERM, RetryableError), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_run_that_is_told_to_end_closes_in_order(
    number: signal.Signals,
    kind: type[BaseException],
    recipe: Recipe,
    ledger: Ledger,
    tracker: Mock,
    monkeypatch: pytest.MonkeyPatch,
    use_stages: Callable[..., None],
) -> None:
    """The runner obeys the signal; record and tracker are closed, the handlers are put back."""
    use_stages(*stages())
    before = signal.getsignal(number)
    run = Runner.run

    def told(runner: Runner) -> None:
        os.kill(os.getpid(), number)
        run(runner)

    monkeypatch.setattr(Runner, "run", told)
    with pytest.raises(kind):
        run_recipe(recipe, ledger)
    assert ledger.runs()[0]["state"] == "stopped"
    tracker.run_finished.assert_called_once_with("KILLED")
    assert signal.getsignal(number) is before
    assert not any(ledger.store.glob("first/*/receipts/*"))


def test_a_tracker_that_fails_does_not_fail_the_run(
    recipe: Recipe,
    ledger: Ledger,
    tracker: Mock,
    use_stages: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is said aloud what MLflow missed, with the address but not the password."""
    tracker.errors = ["ConnectionError: refused", "ConnectionError: again"]
    use_stages(*stages())
    monkeypatch.setattr(Runner, "run", lambda self: None)
    record = run_recipe(recipe, ledger)
    assert (record.state, record.mlflow_missed) == ("finished", 2)
    assert pulse.run_ids(ledger.store) == {record.run_id}  # for the next run to close it
    said = capsys.readouterr().err
    assert "MLflow at http://me:***@127.0.0.1:9 missed 2 calls" in said
    assert "ConnectionError: refused" in said
    assert "secret" not in said


def test_an_unplannable_stage_is_the_users_error(
    recipe: Recipe, ledger: Ledger, tracker: Mock, use_stages: Callable[..., None]
) -> None:
    """A list that is not there is found when its stage is planned, and closes the run as failed."""

    class NoList(FakeStage):
        def plan(self, inputs: Any) -> Any:
            raise UserError("data.list: no file")

    use_stages(NoList(name="first"))
    with pytest.raises(UserError, match=r"data\.list"):
        run_recipe(recipe, ledger)
    assert ledger.runs()[0]["state"] == "failed"
    tracker.run_finished.assert_called_once_with("FAILED")


def test_chosen_stages_bring_what_they_need(ledger: Ledger, demo_recipe: Recipe) -> None:
    """A name chooses a stage, `embed` every cache; needs come along, in order, and no more."""
    planned = plan(demo_recipe, ledger)

    def names(*selected: str) -> list[str]:
        return [one.name for one in select(planned, selected)]

    assert names() == [one.name for one in planned]
    assert names("ingest") == ["ingest"]
    assert names("embed/t5") == ["ingest", "embed/t5"]
    embeds = ["embed/t5", "embed/clip_text", "embed/clip_image"]
    assert names("embed") == ["ingest", "clip_fit", *embeds]
    assert names("base") == ["ingest", "clip_fit", *embeds, "base"]
    with pytest.raises(UserError, match=r"no stage 'embd' in this recipe; it has: ingest, "):
        names("embd")


def orphan(**values: Any) -> dict[str, Any]:
    """Fields of a running run whose driver is gone: the process id is that of another process."""
    mine = {"pid": os.getpid(), "process_started": 1.0, "process_table": process_table()}
    return {"state": "running", **mine, **values}


def test_runs_whose_driver_is_gone_are_closed(ledger: Ledger) -> None:
    """They become killed runs, and what they had in flight is cleared away."""
    write_run(ledger, "done")
    write_run(ledger, "gone", **orphan())
    write_run(ledger, "no-such-process", **orphan(pid=2**22 + 1))
    scratch = [ledger.new_scratch(), ledger.new_scratch("gone")]
    mark = StopMark(ledger.store, "gone")
    mark.put()
    assert set(close_orphans(ledger)) == {"gone", "no-such-process"}
    assert ledger.run("gone")["state"] == "killed"
    assert ledger.run("done")["state"] == "finished"
    assert not any(path.exists() for path in scratch)
    assert not mark.is_there()
    assert close_orphans(ledger) == []


@pytest.mark.parametrize(
    "alive",
    [{"state": "running"}, orphan(host="another-" + socket.gethostname())],
    ids=["here", "elsewhere"],
)
def test_a_run_that_may_be_alive_is_left_alone(ledger: Ledger, alive: dict[str, Any]) -> None:
    """A process of this machine that lives, or any of another, keeps its record and scratch."""
    write_run(ledger, "alive", **alive)
    scratch = ledger.new_scratch()
    assert close_orphans(ledger) == []
    assert ledger.run("alive")["state"] == "running"
    assert scratch.exists()


def test_what_a_killed_run_left_is_cleared_beside_a_live_one(ledger: Ledger) -> None:
    """The live run keeps its own, and so does what is nobody's."""
    for run_id, fields in (("alive", {"state": "running"}), ("gone", orphan())):
        write_run(ledger, run_id, **fields)
    live, dead, nobodys = (ledger.new_scratch(name) for name in ("alive", "gone", ""))
    assert close_orphans(ledger) == ["gone"]
    assert [path.exists() for path in (live, dead, nobodys)] == [True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "s3"])
def test_a_run_of_another_host_counts_by_its_heartbeat(
    kind: str, ledger: Ledger, request: pytest.FixtureRequest
) -> None:
    """It is closed once it was silent for long by the store's clock, and not before."""
    here = Ledger.open(request.getfixturevalue("s3_store")) if kind == "s3" else ledger
    owners = {
        run_id: Owner(run_id, "another-host", 1, 1.0, "another table") for run_id in ("on", "off")
    }
    for owner in owners.values():
        write_run(here, state="running", **vars(owner))
    alive = pulse.begin(here.store, owners["on"])
    silent = lease.acquire(pulse.folder(here.store, "off"), owners["off"], ttl_s=2.0)
    assert isinstance(silent, Lease)
    silent.release()  # it beats no more; for the rest, the file is that of a run that was cut off
    assert close_orphans(here) == []
    time.sleep(8.0)
    assert close_orphans(here) == ["off"]
    alive.release()


def test_a_run_that_finds_everything_closes_what_was_killed(
    recipe: Recipe,
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    use_stages: Callable[..., None],
) -> None:
    """A driver killed after its last stage leaves its run open, in the store and in MLflow."""
    use_stages(*stages())
    finish_all(plan(recipe, ledger))
    write_run(ledger, "gone", **orphan())
    write_run(ledger, "on", state="running")
    for run_id in ("gone", "on"):
        pulse.folder(ledger.store, run_id).mkdir()
    tracker = Mock(errors=["ConnectionError: refused"])
    monkeypatch.setattr("pipelines.tracking.tracker.Tracker", Mock(return_value=tracker))
    run_recipe(recipe, ledger)
    assert ledger.run("gone")["state"] == "killed"
    assert [call[0] for call in tracker.method_calls] == ["close_ended", "run_finished"]
    assert pulse.run_ids(ledger.store) == {"gone", "on"}  # MLflow did not hear: once more
    tracker.errors = []
    run_recipe(recipe, ledger)
    assert pulse.run_ids(ledger.store) == {"on"}


def test_a_record_of_another_version_is_named(ledger: Ledger) -> None:
    """Its fields are not guessed at."""
    write_run(ledger, "newer", colour="blue")
    with pytest.raises(UserError, match=r"runs/newer\.json: another version .*colour"):
        close_orphans(ledger)


def test_two_runs_of_a_second_have_two_ids() -> None:
    """Ids begin with the recipe and sort by time."""
    first, second = (RunRecord(recipe="demo", resolved={}) for _ in range(2))
    assert first.run_id != second.run_id
    assert first.run_id.startswith("demo-20")
