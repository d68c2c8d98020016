"""Tests of where runs are tracked: the database of a store appears whole, and once."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from pipelines.tracking.place import make_database


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
