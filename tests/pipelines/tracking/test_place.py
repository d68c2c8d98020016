"""Tests of where runs are tracked: the database of a store appears whole, and once."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.tracking.place import make_database


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder for caches: one that does not exist yet."""
    monkeypatch.setenv("EDIFFI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def touch(uri: str) -> None:
    """Stands in for MLflow: makes one table."""
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as connection:
        connection.execute("CREATE TABLE runs (number INTEGER)")
        connection.commit()


def tables(store: Path) -> list[str]:
    with closing(sqlite3.connect(store / "mlflow.db")) as connection:
        return [name for (name,) in connection.execute("SELECT name FROM sqlite_master")]


def test_a_driver_that_dies_meanwhile_leaves_no_half(tmp_path: Path) -> None:
    """What it was making lies in its own scratch; the next driver makes its own."""

    def die(uri: str) -> None:
        touch(uri)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_database(tmp_path, "run-1", die)
    assert not (tmp_path / "mlflow.db").exists()
    assert (tmp_path / ".scratch" / "run-1" / "mlflow.db").exists()
    make_database(tmp_path, "run-2", touch)
    assert tables(tmp_path) == ["runs"]


def test_of_two_drivers_one_makes_it(tmp_path: Path) -> None:
    """The slower one leaves the other's as it is, with what it wrote meanwhile."""

    def be_slow(uri: str) -> None:
        touch(uri)
        make_database(tmp_path, "run-2", touch)
        with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
            connection.execute("INSERT INTO runs VALUES (7)")
            connection.commit()

    make_database(tmp_path, "run-1", be_slow)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        assert list(connection.execute("SELECT number FROM runs")) == [(7,)]


def test_one_that_is_there_is_not_touched(tmp_path: Path) -> None:
    """Not even looked into."""
    (tmp_path / "mlflow.db").write_text("whatever it is")

    def refuse(uri: str) -> None:
        raise AssertionError(uri)

    make_database(tmp_path, "run-1", refuse)
    assert (tmp_path / "mlflow.db").read_text() == "whatever it is"
    assert not (tmp_path / ".scratch").exists()


# -- the empty database that is kept for the user ----------------------------------------------


def open_in_mlflow(uri: str) -> None:
    """As a run does."""
    assert MlflowClient(tracking_uri=uri).get_experiment("0") is not None


def schema(database: Path) -> list[tuple[str, ...]]:
    """Tables with their columns, and indices; the order within CHECKs differs from time to time."""
    query = (
        "SELECT m.type, m.name, c.name, c.type FROM sqlite_master m "
        "LEFT JOIN pragma_table_info(m.name) c"
    )
    with closing(sqlite3.connect(database)) as connection:
        return sorted(connection.execute(query), key=str)


def test_a_second_store_is_given_equal_tables(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow makes them once; a later store has nothing of the first one's, and can be written."""
    stores = [tmp_path / name for name in ("first", "second")]
    places = []
    for store in stores:
        store.mkdir()
        monkeypatch.chdir(store)
        make_database(store, "run-1", open_in_mlflow)
        client = MlflowClient(tracking_uri=f"sqlite:///{store / 'mlflow.db'}")
        places.append(client.get_experiment("0").artifact_location)
        experiment = client.create_experiment("demo")
        client.log_metric(client.create_run(experiment).info.run_id, "loss", 1.0)
        if store == stores[0]:
            kept = [path.name for path in cache.iterdir()]
            monkeypatch.setattr(
                "mlflow.store.db.utils._initialize_tables", lambda *_: pytest.fail("made again")
            )
    assert len(kept) == 1
    assert kept[0].startswith("mlflow-3.")
    assert schema(stores[0] / "mlflow.db") == schema(stores[1] / "mlflow.db")
    assert places == [str(store / "mlruns" / "0") for store in stores]


@pytest.mark.parametrize("damage", ["half", "older", "foreign"])
def test_a_kept_one_that_is_of_no_use_is_replaced(
    damage: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off, of another schema or another user: the run makes its own and keeps that one."""
    make_database(tmp_path / "first", "run-1", open_in_mlflow)
    (kept,) = cache.iterdir()
    whole = schema(kept)
    if damage == "older":
        with closing(sqlite3.connect(kept)) as connection:
            connection.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
            connection.commit()
    if damage == "half":
        kept.write_bytes(kept.read_bytes()[:100_000])
    owner = os.getuid()
    if damage == "foreign":
        with closing(sqlite3.connect(kept)) as connection:
            connection.execute("CREATE TABLE more (than MLflow)")
            connection.commit()
        monkeypatch.setattr("os.getuid", lambda: owner + 1)
    make_database(tmp_path / "second", "run-1", open_in_mlflow)
    assert schema(tmp_path / "second" / "mlflow.db") == whole
    assert schema(kept) == whole


@pytest.mark.parametrize("home", ["a file/cache", "~nobody-of-this-name"])
def test_without_a_place_to_keep_it_a_run_takes_only_longer(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container without a home."""
    (tmp_path / "a file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDIFFI_CACHE", home)
    make_database(tmp_path, "run-1", open_in_mlflow)
    assert {("table", "experiments")} <= {row[:2] for row in schema(tmp_path / "mlflow.db")}
