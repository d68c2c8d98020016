"""What `ediffi doctor` asks of a store: who wins there, what time it is, whose version it is."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

from cluster.doctor import Finding, check_clock, nearest_directory
from cluster.profile import Profile
from pipelines.errors import UserError
from pipelines.store.ledger import Ledger
from pipelines.store.location import Location, check_exclusive_create, remove_tree, store_time
from pipelines.store.outages import why_it_failed

NAME = "store"


def check_store(ledger: Ledger) -> list[Finding]:
    """Can it be written, does one of two creators win there, does its clock agree with ours?

    A store that is not there yet is not made: its place is tried, and left as it was.
    """
    store = ledger.store
    if not isinstance(store, Path):
        return _try(ledger, store)
    place = nearest_directory(store) / f".ediffi-doctor-{uuid.uuid4().hex}"
    try:
        return _try(ledger, place)
    finally:
        remove_tree(place)


def check_shared(profile: Profile, ledger: Ledger) -> list[Finding]:
    """Has the place this store, too? A bucket is asked of the nodes alone."""
    store = ledger.store
    if not isinstance(store, Path) or profile.shares(str(store)):
        return []
    shared = ", ".join(profile.shared_paths) or "none"
    found = f"{store} is on this machine, which {profile.name} does not share (shared: {shared})"
    remedy = "name a URL such as s3://bucket/store, or list its directory in shared_paths"
    return [Finding(name=f"{profile.name}: store", ok=False, found=found, remedy=remedy)]


def _try(ledger: Ledger, place: Location) -> list[Finding]:
    store = ledger.store
    try:
        ledger.mark()
        check_exclusive_create(place)
        before = time.time()
        theirs = store_time(place)
        after = time.time()
    except UserError as error:
        remedy = "do what it says, or name another store with --store"
        return [Finding(name=NAME, ok=False, found=str(error), remedy=remedy)]
    except Exception as error:  # every store has errors of its own
        found = f"cannot create or write {store}: {type(error).__name__}: {error}"
        return [Finding(name=NAME, ok=False, found=found, remedy=_remedy(error, store))]
    # object stores and some file systems tell whole seconds
    clock = check_clock("store's clock", theirs, before, after, resolution_s=1.0)
    found = f"{store} can be written, and one of two creators wins"
    return [Finding(name=NAME, ok=True, found=found), clock]


def _remedy(error: Exception, store: Location) -> str:
    if words := why_it_failed(error, store):
        return words
    if isinstance(store, Path):
        return "name a directory that this user may write to"
    return "check the URL, AWS_ENDPOINT_URL and the credentials in the environment"
