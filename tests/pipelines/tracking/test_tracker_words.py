"""Tests of pipelines.tracking.tracker: what may be read by others, and what is not said at all."""

import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from pipelines.tracking.place import default_uri, without_password
from pipelines.tracking.tracker import Tracker


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://me:se-cret@host:5000/x", "https://me:***@host:5000/x"),
        ("postgresql+psycopg2://me:secret@host/db", "postgresql+psycopg2://me:***@host/db"),
        ("http://host:5000", "http://host:5000"),
        ("https://s3cr3ttoken@host/x", "https://***@host/x"),
        ("postgresql://s3cr3ttoken@host/db", "postgresql://***@host/db"),
        ("postgresql://h/db?user=u&password=s3cr3t", "postgresql://h/db?user=u&password=***"),
        ("sqlite:////tmp/a@b:c/mlflow.db", "sqlite:////tmp/a@b:c/mlflow.db"),
    ],
)
def test_addresses_are_shown_without_their_password(uri: str, shown: str) -> None:
    """Only the password is hidden; addresses without one stay as they are."""
    assert without_password(uri) == shown


def test_tags_hold_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage's reasons quote what changed in the recipe, such as an address with its password."""
    monkeypatch.setenv("HF_TOKEN", "hf-very-secret")
    tracker = Tracker("sqlite://", store=tmp_path, recipe_name="demo", run_id="run-1")
    client = Mock()
    tags = {"ediffi.reason": "data.list: http://a changed to http://me:s3cr3t@b?hf-very-secret"}
    tracker._create(client, "", "demo", tags)
    tracker.run_finished("FINISHED", deadline_s=5.0)
    assert client.create_run.call_args.kwargs["tags"] == {
        "ediffi.reason": "data.list: http://a changed to http://me:***@b?***",
        "ediffi.run_id": "run-1",
    }


def test_the_first_touch_is_silent_and_leaves_stderr_to_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """MLflow's steps of making a database are nobody's business; a run's last words are."""
    stderr, during = sys.stderr, []

    def look(*_: object) -> None:
        during.append(sys.stderr)

    from mlflow import MlflowClient

    tracker = Tracker(default_uri(tmp_path), store=tmp_path, recipe_name="demo", run_id="run-1")
    with pytest.MonkeyPatch.context() as patch:
        found = MlflowClient.get_experiment_by_name
        patch.setattr(
            MlflowClient,
            "get_experiment_by_name",
            lambda self, name: (look(), found(self, name))[1],
        )
        tracker.close_ended()
        tracker.run_finished("FINISHED")
    assert tracker.errors == []
    assert during
    assert all(one is stderr for one in during)
    assert capfd.readouterr().err == ""
