"""Whether a run that is noted as running still is: also one whose driver was on another host.

While a run drives it holds a lease that nobody else wants, `runs/<run_id>/lease/`, for its
heartbeat alone. One look must do here, so the file's age is read off the store's own clock, the one
its times are of; clocks of hosts are not compared.
"""

from __future__ import annotations

import errno
import json

from pipelines.store import lease
from pipelines.store.lease import Lease
from pipelines.store.location import Location, names_in, read_text, remove_tree, store_time
from pipelines.store.processes import Owner

_NOT_FOR_WRITING = {errno.EROFS, errno.ENOSPC, errno.EDQUOT}
_SILENT_TTLS = 3  # the age is known to the second, and a beat may have come late


def begin(store: Location, owner: Owner) -> Lease:
    """Show from now on that a run's driver lives."""
    return lease.take(folder(store, owner.run_id), owner)


def clear(store: Location, run_id: str) -> None:
    """Remove what a run that is over showed."""
    remove_tree(folder(store, run_id))


def is_silent(store: Location, run_id: str) -> bool:
    """Whether a run has shown nothing for long; False if it never showed anything.

    Also False where we may not write, as on a mount for reading: the store's clock is read off a
    file of our own, so that there nobody can tell.
    """
    path = lease.newest_file(folder(store, run_id))
    if path is None:
        return False
    try:
        ttl_s = float(json.loads(read_text(path))["ttl_s"])
        seen = path.stat().st_mtime
    except FileNotFoundError:
        return False  # it has just ended
    try:
        return store_time(store) - seen > _SILENT_TTLS * ttl_s
    except OSError as error:
        if isinstance(error, PermissionError) or error.errno in _NOT_FOR_WRITING:
            return False
        raise


def run_ids(store: Location) -> set[str]:
    """Runs that show something, or did when they were cut off."""
    return {name for name in names_in(store / "runs") if not name.endswith((".json", ".stop"))}


def folder(store: Location, run_id: str) -> Location:
    """Where a run shows that its driver lives."""
    return store / "runs" / run_id
