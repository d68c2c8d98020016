"""The job of one stage: its id, what it reads, what it is told, and what is told of its end."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipelines.jobs.stage_job import (
    Standing,
    how_it_ended,
    last_words,
    private_variables,
    recipe_text,
    record_of,
    stem_of,
    variables_of,
)
from pipelines.planning import plan
from pipelines.recipe import Recipe, Resources
from pipelines.recipe_file import load_any_recipe, load_recipe
from pipelines.store.ledger import Ledger
from tests.pipelines.fake_stages import FakeStage


def test_the_id_is_a_function_of_stage_fingerprint_and_store(
    demo_recipe: Recipe, ledger: Ledger, tmp_path: Path, use_stages: Callable[..., None]
) -> None:
    """Any driver finds the job of any other; another store's job is other work."""
    use_stages(FakeStage(name="embed/t5_xxl"))
    (planned,) = plan(demo_recipe, ledger)
    stem = stem_of(planned, ledger)
    assert stem.startswith(f"ediffi-embed-t5-xxl-{planned.fingerprint[:8]}-")
    assert stem == stem_of(plan(demo_recipe, ledger)[0], Ledger.at(ledger.store))
    assert stem != stem_of(planned, Ledger.at(tmp_path / "other"))
    use_stages(FakeStage(name="embed/t5_xxl", setting=1))
    assert stem != stem_of(plan(demo_recipe, ledger)[0], ledger)


def test_the_recipe_that_the_job_reads_leaves_nothing_to_further_jobs(
    ledger: Ledger, tmp_path: Path
) -> None:
    """It is the same recipe, with the same fingerprints, but for `job`."""
    overrides = ["resources.base.job=own", "resources.embed.job=own", "resources.base.cpus=2"]
    recipe = load_recipe("demo", overrides)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(recipe))
    found = load_any_recipe(str(path))
    assert {one.job for one in found.resources.values()} == {"run"}
    assert found.resources["base"] == recipe.resources["base"].model_copy(update={"job": "run"})
    addresses = [[one.fingerprint for one in plan(each, ledger)] for each in (recipe, found)]
    assert addresses[0] == addresses[1]
    assert yaml.safe_load(path.read_text())["data"]["source"] == "urls"


def test_the_record_is_one_that_the_other_commands_read(
    demo_recipe: Recipe, ledger: Ledger
) -> None:
    """A job of kind ray, at the address that took it, known there by the same id."""
    job = record_of("ediffi-x-1", "base", demo_recipe, ledger, "r.yaml", "http://10.0.0.5:8265")
    assert (job.native_id, job.kind, job.stages) == ("ediffi-x-1", "ray", ("base",))
    assert job.profile == {"kind": "ray", "ray": {"address": "http://10.0.0.5:8265"}}
    store = str(ledger.store)
    assert job.command[1:] == ("-m", "pipelines.cli", "run", "r.yaml", "base", "--store", store)


def test_what_the_cluster_tells_of_a_job_holds_no_setting_of_the_driver() -> None:
    """Only which job it is, whose, and its time to end; the webhook is the waiting run's."""
    assert variables_of("ediffi-x-1", "run-1", Resources(stop_deadline_s=30)) == {
        "EDIFFI_JOB_ID": "ediffi-x-1",
        "EDIFFI_PARENT_RUN": "run-1",
        "RAY_JOB_STOP_WAIT_TIME_S": "90",
        "EDIFFI_WEBHOOK_URL": "",
    }


def test_settings_of_store_and_tracker_go_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else; a tracker that is named relative to here is found from anywhere."""
    monkeypatch.chdir(tmp_path)
    environment = {"AWS_PROFILE": "a", "MLFLOW_TRACKING_PASSWORD": "b", "RAY_AUTH_TOKEN": "c"}
    environment |= {"EDIFFI_JOB_ID": "d", "MLFLOW_TRACKING_URI": "e", "HOME": "f"}
    passed = {"AWS_PROFILE": "a", "MLFLOW_TRACKING_PASSWORD": "b"}
    for uri, absolute in (
        ("http://user:word@tracking", "http://user:word@tracking"),
        ("sqlite:///mlflow.db", f"sqlite:///{tmp_path}/mlflow.db"),
        ("sqlite:////store/mlflow.db", "sqlite:////store/mlflow.db"),
    ):
        found = private_variables(environment, uri)
        assert found == passed | {"MLFLOW_TRACKING_URI": absolute}
    assert private_variables({}, "") == {}


@pytest.mark.parametrize(
    ("standing", "words"),
    [
        (None, "is not known to the cluster any more"),
        (Standing(status="FAILED", exit_code=3), "ended with exit code 3"),
        (Standing(status="FAILED", exit_code=-9), "ended with exit code -9"),
        (Standing(status="SUCCEEDED", exit_code=0), "ended with exit code 0"),
        (Standing(status="STOPPED"), "was stopped"),
        (Standing(status="FAILED"), "was lost"),
    ],
)
def test_an_end_is_told_in_words(standing: Standing | None, words: str) -> None:
    """Whatever the cluster knows of it."""
    assert how_it_ended(standing) == words


def test_the_last_words_are_few_and_hold_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own sentence before them is left out, unless there is nothing else."""
    monkeypatch.setenv("OUR_TOKEN", "hidden-value")
    said = "\n".join([*(f"line {number}" for number in range(40)), "", "it was hidden-value"])
    message = (
        "Job entrypoint command failed with exit code 1, last available logs (truncated to "
        f"20,000 chars):\n{said}"
    )
    found = last_words(Standing(status="FAILED", exit_code=1, message=message))
    assert found == [*(f"line {number}" for number in range(29, 40)), "it was ***"]
    lost = Standing(status="FAILED", message="Job supervisor actor died: no node")
    assert last_words(lost) == ["Job supervisor actor died: no node"]
    assert last_words(None) == []
