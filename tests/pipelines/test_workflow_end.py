"""Tests of pipelines.workflow: how a run ends when its surroundings fail, or it is told to end."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest

from pipelines.driver.runner import Runner
from pipelines.errors import RetryableError, StageFailed, UserError
from pipelines.planning import plan
from pipelines.recipe import Recipe
from pipelines.store import pulse
from pipelines.store.ledger import Ledger
from pipelines.workflow import run_recipe
from tests.pipelines.fake_stages import FakeStage, finish_all, write_run

SHOWN_URI = "http://me:***@127.0.0.1:9"


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch, use_stages: Callable[..., None]) -> Mock:
    """In MLflow's place; Ray is not started, and what the runner does is up to the test."""
    tracker = Mock(parent_run_id="mlflow-1", errors=[])
    monkeypatch.setattr("pipelines.tracking.tracker.Tracker", Mock(return_value=tracker))
    monkeypatch.setattr("pipelines.driver.ray_cluster.connect", lambda: None)
    monkeypatch.setattr("pipelines.driver.ray_cluster.disconnect", lambda: None)
    monkeypatch.setattr(Runner, "run", lambda self: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    use_stages(FakeStage(name="first"))
    return tracker


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the webhook was told, record by record."""
    records: list[dict[str, Any]] = []
    monkeypatch.setattr("pipelines.webhook.tell", lambda record, say: records.append(dict(record)))
    return records


def raising(error: BaseException) -> Callable[..., None]:
    """A function that raises."""

    def act(*_: Any, **__: Any) -> None:
        raise error

    return act


# -- telling --------------------------------------------------------------------------------------


def test_the_webhook_is_told_although_the_store_is_full(
    demo_recipe: Recipe,
    ledger: Ledger,
    tracker: Mock,
    told: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Then most of all: the record cannot be written, and the cause is what is raised."""

    def fill(runner: Runner) -> None:
        full = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(Ledger, "write_run", raising(full))
        raise StageFailed("first: 1 of 2 units failed")

    monkeypatch.setattr(Runner, "run", fill)
    with pytest.raises(StageFailed):
        run_recipe(demo_recipe, ledger)
    assert [(one["state"], one["error"]) for one in told] == [
        ("failed", "first: 1 of 2 units failed")
    ]
    assert "writing the record of run" in capsys.readouterr().err


def test_a_finished_run_that_leaves_no_record_is_told_with_the_reason(
    demo_recipe: Recipe,
    ledger: Ledger,
    tracker: Mock,
    told: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command ends as one to be repeated, and the webhook says why."""

    def fill(runner: Runner) -> None:
        monkeypatch.setattr(Ledger, "write_run", raising(OSError(errno.EIO, "a bad disk")))

    monkeypatch.setattr(Runner, "run", fill)
    with pytest.raises(RetryableError, match="a bad disk"):
        run_recipe(demo_recipe, ledger)
    assert "a bad disk" in told[0]["error"]


def test_a_run_that_is_refused_at_planning_is_told_and_noted(
    demo_recipe: Recipe,
    ledger: Ledger,
    tracker: Mock,
    told: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody may be at the terminal; the store says it too."""
    monkeypatch.setattr("pipelines.workflow.plan", raising(UserError("data.list: no file")))
    with pytest.raises(UserError):
        run_recipe(demo_recipe, ledger)
    assert [(one["state"], one["error"]) for one in told] == [("failed", "data.list: no file")]
    assert ledger.runs() == [{**ledger.runs()[0], **told[0]}]


def test_a_run_that_finds_everything_is_not_told(
    demo_recipe: Recipe, ledger: Ledger, tracker: Mock, told: list[dict[str, Any]]
) -> None:
    """It did nothing that anybody waits for."""
    finish_all(plan(demo_recipe, ledger))
    assert run_recipe(demo_recipe, ledger).state == "finished"
    assert told == []


def test_the_record_holds_no_secrets(
    demo_recipe: Recipe, ledger: Ledger, tracker: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ediffi status` shows its error to everybody who may read the store."""
    monkeypatch.setenv("HF_TOKEN", "hf-very-secret")
    monkeypatch.setattr(Runner, "run", raising(StageFailed("a: no hf-very-secret")))
    with pytest.raises(StageFailed):
        run_recipe(demo_recipe, ledger)
    assert ledger.runs()[0]["error"] == "a: no ***"


# -- tidying up -----------------------------------------------------------------------------------


def test_the_first_error_is_the_one_that_is_told(
    demo_recipe: Recipe,
    ledger: Ledger,
    tracker: Mock,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What fails after it is said, and everything else is done all the same."""
    left = Mock()
    monkeypatch.setattr("pipelines.driver.ray_cluster.disconnect", left)
    monkeypatch.setattr(Runner, "run", raising(StageFailed("b is broken")))
    broken = raising(OSError(errno.EIO, "a bad disk"))
    monkeypatch.setattr("pipelines.worker.unit_log_file.recover", broken)
    with pytest.raises(StageFailed, match="b is broken"):
        run_recipe(demo_recipe, ledger)
    assert "at the run's end: OSError: [Errno 5] a bad disk" in capsys.readouterr().err
    left.assert_called_once()
    tracker.run_finished.assert_called_once_with("FAILED")
    assert not ledger.scratch_names()


def test_a_finished_run_that_cannot_be_tidied_up_ends_as_one_to_repeat(
    demo_recipe: Recipe, ledger: Ledger, tracker: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no other error that this one could hide."""
    broken = raising(OSError(errno.EIO, "a bad disk"))
    monkeypatch.setattr("pipelines.worker.unit_log_file.recover", broken)
    with pytest.raises(RetryableError, match="a bad disk"):
        run_recipe(demo_recipe, ledger)
    tracker.run_finished.assert_called_once_with("FINISHED")


def test_rows_of_found_stages_ask_nothing_of_the_store(
    demo_recipe: Recipe,
    ledger: Ledger,
    tracker: Mock,
    use_stages: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A manifest that cannot be read any more must not hide why the run failed."""
    use_stages(FakeStage(name="first"), FakeStage(name="second", needs=("first",)))
    first = plan(demo_recipe, ledger)[0]
    finish_all([first])

    def lose(runner: Runner) -> None:
        runner._start(runner.states["first"])
        (first.record.directory / "manifest.json").unlink()
        raise StageFailed("second is broken")

    monkeypatch.setattr(Runner, "run", lose)
    with pytest.raises(StageFailed, match="second is broken"):
        run_recipe(demo_recipe, ledger)
    (row,) = ledger.runs()[0]["stages"]
    assert (row["name"], row["state"], row["units"]) == ("first", "cached", 0)


# -- MLflow ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_all_there", [True, False], ids=["finds all", "drives"])
def test_what_is_tracked_elsewhere_stays_open_for_who_can_close_it(
    is_all_there: bool, demo_recipe: Recipe, ledger: Ledger, tracker: Mock
) -> None:
    """A killed run keeps what shows that it must be closed until a run is tracked where it was."""
    if is_all_there:
        finish_all(plan(demo_recipe, ledger))
    uris = {"here": SHOWN_URI, "elsewhere": "http://another:5000", "older": ""}
    for run_id, uri in uris.items():
        write_run(ledger, run_id, state="killed", tracking_uri=uri)
        pulse.folder(ledger.store, run_id).mkdir()
    run_recipe(demo_recipe, ledger)
    assert pulse.run_ids(ledger.store) == {"elsewhere"}
    run_recipe(demo_recipe, ledger, tracking_uri="http://another:5000")
    assert pulse.run_ids(ledger.store) == set()


# -- signals --------------------------------------------------------------------------------------


def send_sigterm(*_: Any, **__: Any) -> None:
    """To this process, as a scheduler does."""
    os.kill(os.getpid(), signal.SIGTERM)


def start_as_ray_does() -> None:
    """Take SIGTERM, and keep it."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))


def start_and_be_told() -> None:
    """The signal comes while Ray starts."""
    start_as_ray_does()
    send_sigterm()


@pytest.mark.parametrize("moment", ["before Ray", "while Ray starts", "after Ray"])
def test_sigterm_before_the_first_unit_is_to_be_repeated(
    moment: str,
    demo_recipe: Recipe,
    ledger: Ledger,
    tracker: Mock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At whatever moment it comes, the run ends in order and no unit is begun."""
    before, ran = signal.getsignal(signal.SIGTERM), Mock()
    monkeypatch.setattr(Runner, "run", ran)
    if moment == "before Ray":
        tracker.run_started.side_effect = send_sigterm
    elif moment == "while Ray starts":
        monkeypatch.setattr("pipelines.driver.ray_cluster.connect", start_and_be_told)
    else:
        monkeypatch.setattr("pipelines.driver.ray_cluster.connect", send_sigterm)
    with pytest.raises(RetryableError, match="told to end"):
        run_recipe(demo_recipe, ledger)
    ran.assert_not_called()
    tracker.run_finished.assert_called_once_with("KILLED")
    assert ledger.runs()[0]["state"] == "stopped"
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_while_mlflow_is_closed_hinders_nothing(
    demo_recipe: Recipe, ledger: Ledger, tracker: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is done by then; Ray's own answer would be to end the process with a failure."""
    monkeypatch.setattr("pipelines.driver.ray_cluster.connect", start_as_ray_does)
    tracker.run_finished.side_effect = send_sigterm
    assert run_recipe(demo_recipe, ledger).state == "finished"
    assert ledger.runs()[0]["state"] == "finished"


def test_mlflow_ends_before_its_run_loses_its_scratch(
    demo_recipe: Recipe, ledger: Ledger, tracker: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run of a few seconds the database is still being made there."""
    found = []

    def begin(runner: Runner) -> None:
        [name] = [record["run_id"] for record in ledger.runs()]
        database = ledger.scratch_of(name) / "mlflow.db"
        database.parent.mkdir(parents=True)
        database.write_text("half of it")
        tracker.run_finished.side_effect = lambda status: found.append(database.exists())

    monkeypatch.setattr(Runner, "run", begin)
    run_recipe(demo_recipe, ledger)
    assert found == [True]
    assert ledger.scratch_names() == set()
