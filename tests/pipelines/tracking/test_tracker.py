"""Tests of pipelines.tracking.tracker: what stands in a real MLflow database after a run."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.planning import PlannedStage, plan
from pipelines.recipe import Recipe
from pipelines.stage import File, Manifest
from pipelines.store.ledger import Ledger
from pipelines.tracking.place import default_uri
from pipelines.tracking.tracker import NICENESS, Tracker
from tests.pipelines.fake_stages import FakeStage, manifest, receipt, write_run

ROWS = [{"images": 500.0, "loss": 0.5, "images_per_s": 90.0}, {"images": 1000.0, "loss": 0.25}]


@dataclass
class Database:
    """An MLflow database in the store, the stages that were run, and what it holds of them."""

    ledger: Ledger
    planned: dict[str, PlannedStage]

    def tracker(self, run_id: str, recipe_name: str = "demo") -> Tracker:
        uri = default_uri(self.ledger.store)
        return Tracker(uri, store=self.ledger.store, recipe_name=recipe_name, run_id=run_id)

    @property
    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=default_uri(self.ledger.store))

    def runs(self, run_id: str) -> dict[str, Any]:
        """MLflow's runs of one of ours, by name."""
        experiments = [one.experiment_id for one in self.client.search_experiments()]
        found = self.client.search_runs(experiments, f"tags.`ediffi.run_id` = '{run_id}'")
        return {run.info.run_name: run for run in found}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory, demo_recipe: Recipe) -> Iterator[Database]:
    """After three runs: one that finished, one that found its stages, one stopped midway."""
    ledger = Ledger.open(tmp_path_factory.mktemp("tracking") / "store")
    stages = [
        FakeStage(name="ingest", setting={"px": 16, "resize": "pad"}),
        FakeStage(name="experts", units=("low", "high"), needs=("ingest",)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.planning.build_stages", lambda recipe: stages)
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        planned = {one.name: one for one in plan(demo_recipe, ledger)}
        one = Database(ledger=ledger, planned=planned)
        finish_run(one)
        find_run(one)
        stop_run(one)
        yield one


def finished(one: PlannedStage) -> Manifest:
    """The stage's manifest as if its units had made figures and a picture."""
    picture = one.record.directory / "grid.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(picture)
    facts = {"metrics": {"final_loss": 0.125}, "artifacts": ["grid.png"]}
    counts = {"num_in": 5, "num_out": 3, "rejects": {"image_truncated": ["x", "y"]}}
    counts["files"] = (File(path="grid.png", sha256="", num_bytes=0),)
    return manifest(
        one.record.directory, receipt("low", facts=facts, **counts), receipt("high"), stage=one.name
    )


def finish_run(database: Database) -> None:
    ingest, experts = database.planned["ingest"], database.planned["experts"]
    tracker = database.tracker("run-1")
    tracker.run_started({"name": "demo", "base": {"lr": 0.001}, "long": "x" * 900})
    tracker.stage_started(ingest, {})
    tracker.stage_finished(finished(ingest), {})
    tracker.stage_started(experts, {"ingest": finished(ingest)})
    tracker.progress("experts", "low", ROWS[:1])
    tracker.progress("experts", "high", ROWS)
    tracker.progress("experts", "low", ROWS[1:])
    grid = experts.record.directory / "grid.png"
    tracker.grids("experts", "low", {"grid.png": grid, "E1_1/grid.png": grid})
    tracker.stage_finished(finished(experts), {"low": ROWS, "high": ROWS})
    tracker.run_finished("FINISHED")
    assert tracker.errors == []
    assert tracker.parent_run_id


def find_run(database: Database) -> None:
    tracker = database.tracker("run-2")
    tracker.run_started({"name": "demo"})
    tracker.stage_cached(database.planned["ingest"], finished(database.planned["ingest"]))
    tracker.stage_started(database.planned["experts"], {})
    tracker.stage_failed("experts", "high: it broke")
    tracker.run_finished("FAILED")
    assert tracker.errors == []


def stop_run(database: Database) -> None:
    tracker = database.tracker("run-3")
    tracker.run_started({"name": "demo"})
    tracker.stage_started(database.planned["experts"], {})
    tracker.progress("experts", "low", ROWS)
    tracker.run_finished("KILLED")
    assert tracker.errors == []


def test_runs_form_a_tree(database: Database) -> None:
    """Stages hang below the run and units below their stage, all closed and all with our id."""
    runs = database.runs("run-1")
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    ids = {name: run.info.run_id for name, run in runs.items()}
    assert parents == {
        "demo": None,
        "ingest": ids["demo"],
        "experts": ids["demo"],
        "low": ids["experts"],
        "high": ids["experts"],
    }
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_settings_are_parameters(database: Database) -> None:
    """The whole recipe on the parent, a stage's own settings on it; long values are cut."""
    runs = database.runs("run-1")
    assert runs["demo"].data.params == {"name": "demo", "base.lr": "0.001", "long": "x" * 500}
    assert runs["ingest"].data.params == {"setting.px": "16", "setting.resize": "pad"}
    files = [one.path for one in database.client.list_artifacts(runs["demo"].info.run_id)]
    assert files == ["recipe.json"]


def test_metrics_count_images(database: Database) -> None:
    """A unit's rows become metrics by images seen, in order, each once."""
    run = database.runs("run-1")["low"].info.run_id
    history = database.client.get_metric_history(run, "loss")
    assert [(one.step, one.value) for one in history] == [(500, 0.5), (1000, 0.25)]
    speeds = database.client.get_metric_history(run, "images_per_s")
    assert [(one.step, one.value) for one in speeds] == [(500, 90.0)]
    assert "images" not in database.runs("run-1")["low"].data.metrics


def test_a_stage_shows_its_counts_and_figures(database: Database) -> None:
    """Samples, rejects by reason, seconds, and what each unit measured, on the run too."""
    assert database.runs("run-1")["ingest"].data.metrics == {
        "units": 2,
        "samples_in": 5,
        "samples_out": 3,
        "bytes": 0,
        "seconds": 3.0,
        "rejects/image_truncated": 2,
        "low/final_loss": 0.125,
    }
    assert database.runs("run-1")["demo"].data.metrics["ingest/low/final_loss"] == 0.125


def test_inputs_are_data_sets_with_their_fingerprints(database: Database) -> None:
    """What a stage read is named, addressed and found in the store."""
    (entry,) = database.runs("run-1")["experts"].inputs.dataset_inputs
    ingest = database.planned["ingest"]
    assert (entry.dataset.name, entry.dataset.digest) == ("ingest", ingest.fingerprint)
    assert entry.dataset.source == str(ingest.record.directory)


def test_pictures_and_curves_are_artifacts(database: Database) -> None:
    """They lie beside the database, in the store, and can be opened."""
    run = database.runs("run-1")["experts"]
    names = [one.path for one in database.client.list_artifacts(run.info.run_id)]
    assert sorted(names) == ["curves", "grid.png", "grids"]
    curves = [one.path for one in database.client.list_artifacts(run.info.run_id, "curves")]
    assert sorted(curves) == ["curves/images_per_s.png", "curves/loss.png"]
    place = Path(run.info.artifact_uri.removeprefix("file://"))
    assert place.is_relative_to(database.ledger.store / "mlflow-artifacts" / "demo")
    with Image.open(place / "curves" / "loss.png") as picture:
        assert picture.size[0] > 100


def test_a_stage_that_was_found_points_to_the_run_that_made_it(database: Database) -> None:
    """A hit is a finished child with the figures, tagged with MLflow's id of its origin."""
    run = database.runs("run-2")["ingest"]
    assert run.data.tags["cached_from"] == database.runs("run-1")["ingest"].info.run_id
    assert run.data.tags["ediffi.state"] == "cached"
    assert run.data.tags["ediffi.fingerprint"] == database.planned["ingest"].fingerprint
    assert run.info.status == "FINISHED"
    assert run.data.metrics["samples_out"] == 3


def test_a_failed_stage_says_why(database: Database) -> None:
    """The failure's words are a tag; stage and run are closed as failed."""
    runs = database.runs("run-2")
    assert runs["experts"].data.tags["ediffi.error"] == "high: it broke"
    assert (runs["experts"].info.status, runs["demo"].info.status) == ("FAILED", "FAILED")


def test_a_stopped_run_leaves_nothing_open(database: Database) -> None:
    """Ctrl-C midway closes the run with the stage and the units that were under way."""
    runs = database.runs("run-3")
    assert {name: run.info.status for name, run in runs.items()} == {
        "demo": "KILLED",
        "experts": "KILLED",
        "low": "KILLED",
    }


def leave_open(database: Database, run_id: str) -> None:
    """A driver's MLflow runs as a SIGKILL leaves them."""
    dead = database.tracker(run_id)
    dead.run_started({"name": "demo"})
    dead.stage_started(database.planned["ingest"], {})
    dead._calls.put(None)  # the process ends here: nothing is closed
    dead._thread.join(60)
    assert statuses(database, run_id) == {"RUNNING"}


def statuses(database: Database, run_id: str) -> set[str]:
    return {run.info.status for run in database.runs(run_id).values()}


def test_what_ended_drivers_left_open_is_closed_by_the_next(database: Database) -> None:
    """By the store's record of each, whatever recipe comes next, however it ended."""
    for run_id, state in (("run-dead", "killed"), ("run-late", "finished"), ("run-odd", "failed")):
        leave_open(database, run_id)
        write_run(database.ledger, run_id, state=state)
    following = database.tracker("run-next", recipe_name="another")
    following.run_started({"name": "another"})
    following.run_finished("FINISHED")
    assert following.errors == []
    assert statuses(database, "run-dead") == {"KILLED"}
    assert statuses(database, "run-late") == {"FINISHED"}
    assert statuses(database, "run-odd") == {"FAILED"}
    assert database.runs("run-1")["demo"].info.status == "FINISHED"


def test_runs_that_may_be_alive_are_left_open(database: Database) -> None:
    """Those noted as running, and those of which this store knows nothing: a server has many."""
    write_run(database.ledger, "run-alive", state="running")
    for run_id in ("run-alive", "of-another-store", "../run-alive"):
        leave_open(database, run_id)
    following = database.tracker("run-after")
    following.close_ended()
    following.run_finished("FINISHED")
    assert following.errors == []
    for run_id in ("run-alive", "of-another-store", "../run-alive"):
        assert statuses(database, run_id) == {"RUNNING"}
    assert database.runs("run-after") == {}  # closing alone opens nothing


def test_a_run_that_was_killed_before_its_parent_was_known_is_closed(database: Database) -> None:
    """The record has no id of MLflow's yet: the tag that each run is born with is enough."""
    leave_open(database, "run-early")
    write_run(database.ledger, "run-early", state="killed", mlflow_run_id="")
    following = database.tracker("run-then")
    following.close_ended()
    following.run_finished("FINISHED")
    assert statuses(database, "run-early") == {"KILLED"}


def test_figures_of_the_run_stand_on_its_parent(database: Database) -> None:
    """What it cost, measured when all else is told; a measurement that fails harms nothing."""
    tracker = database.tracker("run-cost")
    tracker.run_started({"name": "demo"})
    tracker.figures(lambda: {"cost/device_hours_cpu": 1.5})
    tracker.figures(lambda: {}["missing"])
    tracker.run_finished("FINISHED")
    assert tracker.errors == ["KeyError: 'missing'"]
    run = database.runs("run-cost")["demo"]
    assert run.data.metrics["cost/device_hours_cpu"] == 1.5
    assert run.info.status == "FINISHED"


def test_no_secret_reaches_mlflow(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in parameters, nor in the recipe beside them, nor in what a failure says."""
    monkeypatch.setenv("HF_TOKEN", "hunter2hunter2")
    tracker = database.tracker("run-secret")
    prefix = "http://me:opensesame@host/"
    tracker.run_started({"data": {"address_prefix": prefix, "list": ["hunter2hunter2", 3]}})
    tracker.stage_started(database.planned["ingest"], {})
    tracker.stage_failed("ingest", f"no hunter2hunter2 at {prefix}")
    tracker.run_finished("FAILED")
    assert tracker.errors == []
    runs = database.runs("run-secret")
    place = Path(runs["demo"].info.artifact_uri.removeprefix("file://"))
    recipe = (place / "recipe.json").read_text()
    told = [recipe, *(str(run.data.to_dictionary()) for run in runs.values())]
    assert not any("hunter2" in text or "opensesame" in text for text in told)
    assert "http://me:***@host/" in recipe
    assert runs["ingest"].data.tags["ediffi.error"] == "no *** at http://me:***@host/"


def test_a_server_that_cannot_be_reached_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_recipe: Recipe, ledger: Ledger
) -> None:
    """Every call that was missed is kept as an error, none is raised, no password is shown."""
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR"):
        monkeypatch.setenv(name, "0")
    uri = "http://me:secret@127.0.0.1:9"
    tracker = Tracker(uri, store=tmp_path, recipe_name="demo", run_id="run-1")
    tracker.run_started({"name": "demo"})
    tracker.stage_failed("ingest", "no matter")
    tracker.run_finished("FAILED")
    assert len(tracker.errors) == 4  # what others left open is looked for, too
    assert "127.0.0.1" in tracker.errors[0]
    assert not any("secret" in error for error in tracker.errors)
    assert tracker.parent_run_id == ""


def test_a_tracker_that_hangs_is_left_behind(tmp_path: Path) -> None:
    """The run does not wait for MLflow for ever; it says how much is missing."""
    from threading import Event

    held = Event()
    tracker = Tracker("sqlite://", store=tmp_path, recipe_name="demo", run_id="run-1")
    tracker._connect = lambda: held.wait(60)  # type: ignore[method-assign]
    tracker.run_started({})
    tracker.run_finished("FINISHED", deadline_s=0.05)
    held.set()
    assert any("still" in error and "behind" in error for error in tracker.errors)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_the_thread_gives_way_to_all_others(tmp_path: Path) -> None:
    """Ray's processes start while it imports MLflow; the driver itself stays as it was."""
    niceness = []
    tracker = Tracker("sqlite://", store=tmp_path, recipe_name="demo", run_id="run-1")
    thread = tracker._thread.native_id or 0
    tracker._connect = lambda: niceness.append(os.getpriority(os.PRIO_PROCESS, thread))  # type: ignore[method-assign]
    tracker.run_started({})
    tracker.run_finished("FINISHED")
    assert niceness[0] - os.getpriority(os.PRIO_PROCESS, 0) == NICENESS


def test_pictures_drawn_while_training_are_kept_by_unit(database: Database) -> None:
    """They lie in the stage's run, in a folder of the unit that drew them, and of its levels."""
    run = database.runs("run-1")["experts"].info.run_id
    folders = ("grids/low", "grids/low/E1_1")
    found = [database.client.list_artifacts(run, folder) for folder in folders]
    assert [one.path for one in found[0]] == ["grids/low/E1_1", "grids/low/grid.png"]
    assert [one.path for one in found[1]] == ["grids/low/E1_1/grid.png"]
