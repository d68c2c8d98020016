"""Where runs are tracked: an address, or a database of the store's own, which is made whole."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from pipelines.masking import MASK, mask
from pipelines.store.ledger import SCRATCH_FOLDER
from pipelines.store.location import Location, publish

DATABASE = "mlflow.db"


def default_uri(store: Location) -> str:
    """The tracking database that lies in the store itself; beside an object store, here."""
    return f"sqlite:///{local_side(store) / DATABASE}"


def local_side(store: Location) -> Path:
    """Where on this machine what cannot lie in an object store is kept."""
    return store if isinstance(store, Path) else Path("ediffi-store").absolute()


def without_password(uri: str) -> str:
    """The address as it may be shown or logged; a name without a password may be a token."""
    return re.sub(r"^(\w[\w+.-]*://)[^/:@]+@", rf"\1{MASK}@", mask(uri))


def make_database(store: Location, run_id: str, touch: Callable[[str], object]) -> None:
    """Make the tables of a new database aside: a driver that is killed meanwhile leaves no half.

    Args:
        run_id: in whose scratch they are made.
        touch: makes what a database at a URI lacks, and refuses one of another MLflow.
    """
    side = local_side(store)
    database, scratch = side / DATABASE, side / SCRATCH_FOLDER / run_id
    if database.exists():
        return
    scratch.mkdir(parents=True, exist_ok=True)
    aside = scratch / f"copied-{DATABASE}"
    try:
        _copy_blank(aside)
        touch(f"sqlite:///{aside}")
    except Exception:  # none is kept, or it is of no use: sqlalchemy and alembic have their own
        aside = scratch / DATABASE  # MLflow still has the other one open
        touch(f"sqlite:///{aside}")
        # no home, no room: then the next run takes a second more
        with contextlib.suppress(OSError, RuntimeError, sqlite3.Error):
            _keep(aside, _blank())
    # Another driver may have been faster; and where there are no links, MLflow makes it in place.
    with contextlib.suppress(OSError):
        os.link(aside, database)


def _blank() -> Path:
    """Where the user's empty database lies: to make one takes MLflow more than a second of a core.

    Its tables are those of one version of MLflow.

    Raises:
        RuntimeError: the user has no home.
    """
    from ediffi.storage.local_cache import default_directory

    return default_directory() / f"mlflow-{importlib.metadata.version('mlflow')}.db"


def _copy_blank(database: Path) -> None:
    """Begin a database with what is kept.

    Raises:
        OSError: nothing is kept; PermissionError: by another user, who may have put more into it.
        RuntimeError: the user has no home.
    """
    blank = _blank()
    if blank.stat().st_uid != os.getuid():
        raise PermissionError(f"{blank} is not ours")
    shutil.copyfile(blank, database)


def _keep(database: Path, blank: Path) -> None:
    """Keep a new database as the blank one, without the experiment MLflow has put there.

    For that one names a folder; MLflow puts another into a database that has none.
    """
    blank.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=blank.parent, prefix=".making-") as folder:
        copy = Path(folder) / blank.name
        shutil.copyfile(database, copy)
        with contextlib.closing(sqlite3.connect(copy)) as connection:
            connection.execute("DELETE FROM experiments")
            connection.commit()
        publish(copy, blank)
