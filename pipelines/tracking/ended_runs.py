"""MLflow runs that were left open by a driver that is over, and how they are closed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pipelines.store.location import Location, read_text

# A run's state in its record -> what MLflow calls it; of others nobody knows that they are over.
STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED", "killed": "KILLED"}


def close_ended(client: Any, store: Location, own_run_id: str) -> None:
    """Close what is open in MLflow although the driver that opened it is over.

    That it is over says the store it worked in, by its record of the run. A run of which this
    store has no record is another store's, and one that is noted as running may be alive.

    Args:
        client: an MlflowClient.
        own_run_id: of the run that asks, which is not over.
    """
    states = {own_run_id: "running"}
    for run in _all_runs(client, "attributes.status = 'RUNNING' and tags.`ediffi.run_id` LIKE '%'"):
        run_id = run.data.tags["ediffi.run_id"]
        if run_id not in states:
            states[run_id] = _noted_state(store, run_id)
        if (status := STATUS.get(states[run_id])) is not None:
            client.set_terminated(run.info.run_id, status)


def _noted_state(store: Location, run_id: str) -> str:
    """A run's state by its record in our store; "" if there is none."""
    if not re.fullmatch(r"[\w.-]+", run_id):  # the tag may be anybody's
        return ""
    try:
        text = read_text(store / "runs" / f"{run_id}.json")
    except FileNotFoundError:
        return ""
    return str(json.loads(text)["state"])


def _all_runs(client: Any, query: str) -> list[Any]:
    """Runs of every experiment: all of them before any is closed, which would shift the pages."""
    places = [one.experiment_id for one in _pages(client.search_experiments)]
    return list(_pages(partial(client.search_runs, places, query))) if places else []


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    token: str | None = None
    while True:
        page = search(page_token=token)
        yield from page
        if not (token := page.token):
            return
