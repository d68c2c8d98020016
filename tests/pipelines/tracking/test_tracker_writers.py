"""Several drivers at once on one MLflow database that nobody has touched before.

Each driver is a process of its own; SQLite is a file, PostgreSQL a server of this test's own.
"""

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
NUM_WRITERS = 3
WRITER = """
import sys
from pathlib import Path
from pipelines.tracking.tracker import Tracker

uri, store, number = sys.argv[1:]
tracker = Tracker(uri, store=Path(store), recipe_name="demo", run_id=f"run-{number}")
tracker.run_started({"name": "demo", "number": number})
for images in range(20):
    tracker.figures(lambda: {"images": images, "loss": 1.0 / (images + 1)})
tracker.run_finished("FINISHED", deadline_s=250)
print("; ".join(tracker.errors))
"""


def write_at_once(uri: str, store: Path) -> list[str]:
    """What each of several drivers missed; they all start on an empty database."""
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, uri, str(store), str(number)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(NUM_WRITERS)
    ]
    return [one.communicate(timeout=280)[0].strip() for one in writers]


def runs(uri: str) -> dict[str, Any]:
    """MLflow's runs by our ids."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (experiment,) = (one for one in client.search_experiments() if one.name == "demo")
    found = client.search_runs([experiment.experiment_id])
    return {run.data.tags["ediffi.run_id"]: run for run in found}


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[str]:
    """The URI of an empty database on a server of its own, on loopback."""
    binaries = Path(shutil.which("pg_config") or "/usr/lib/postgresql/15/bin/pg_config").parent
    programs = [shutil.which(name) or str(binaries / name) for name in ("initdb", "postgres")]
    if not all(Path(program).exists() for program in programs):
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    if importlib.util.find_spec("psycopg2") is None:
        pytest.skip("needs psycopg2, by which MLflow talks to PostgreSQL: psycopg2-binary")
    user = None
    if os.getuid() == 0:  # PostgreSQL refuses to be run by root
        user = "postgres" if "postgres" in {one.pw_name for one in pwd.getpwall()} else "nobody"
    folder = Path("/tmp") / f"ediffi-postgres-{os.getpid()}"
    folder.mkdir()
    if user is not None:
        shutil.chown(folder, user)
    data = str(folder / "data")
    words = ["-A", "trust", "-U", "mlflow", "--no-sync", "-D", data]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        subprocess.run([programs[0], *words], user=user, check=True, capture_output=True, cwd="/")
        server = subprocess.Popen(
            [programs[1], "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", str(folder)],
            user=user,
            cwd="/",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            uri = f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
            _await_listening(port)
            yield uri
        finally:
            server.send_signal(signal.SIGINT)  # SIGTERM waits until MLflow lets go of it
            server.wait(60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _await_listening(port: int) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < end, "PostgreSQL did not start"
            time.sleep(0.1)
        else:
            return


def assert_all_is_there(uri: str, missed: list[str]) -> None:
    assert missed == [""] * NUM_WRITERS
    found = runs(uri)
    assert sorted(found) == [f"run-{number}" for number in range(NUM_WRITERS)]
    for number in range(NUM_WRITERS):
        run = found[f"run-{number}"]
        assert run.info.status == "FINISHED"
        assert run.data.params["number"] == str(number)
        assert run.data.metrics["loss"] == pytest.approx(1 / 20)


@pytest.mark.slow
def test_several_writers_of_a_fresh_sqlite_file(tmp_path: Path) -> None:
    """One makes the tables, the others wait for it; nobody misses a call."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert_all_is_there(uri, write_at_once(uri, tmp_path))


@pytest.mark.slow
def test_several_writers_of_a_fresh_postgresql(postgres: str, tmp_path: Path) -> None:
    """The same on a server's database."""
    assert_all_is_there(postgres, write_at_once(postgres, tmp_path))
