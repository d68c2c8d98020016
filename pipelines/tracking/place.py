"""Where runs are tracked: an address, or a database of the store's own, which is made whole."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from pipelines.masking import MASK, mask
from pipelines.store.ledger import SCRATCH_FOLDER
from pipelines.store.location import Location

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
        touch: makes them, at a URI.
    """
    side = local_side(store)
    database, aside = side / DATABASE, side / SCRATCH_FOLDER / run_id / DATABASE
    if database.exists():
        return
    aside.parent.mkdir(parents=True, exist_ok=True)
    touch(f"sqlite:///{aside}")
    # Another driver may have been faster; and where there are no links, MLflow makes it in place.
    with contextlib.suppress(OSError):
        os.link(aside, database)
