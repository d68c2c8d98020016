"""Variables on their way from one driver to the driver of a job, seen by nobody in between.

What a job's `runtime_env` holds Ray tells to every program that may ask about the job, writes into
its logs and hands on to all units. So settings with secrets among them go through the key-value
table of the cluster's head instead, of which no page and no log tells. The request names only the
key; the job takes its variables out at its start.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from typing import Any

from pipelines.errors import RetryableError

KEY_VARIABLE = "EDIFFI_VARIABLES_KEY"
_NAMESPACE = b"ediffi"


def put(variables: Mapping[str, str], address: str) -> str:
    """Leave variables with the cluster's head; returns the key.

    Args:
        address: of the head's tables (its GCS), host:port.
    """
    key = secrets.token_hex(16)
    text = json.dumps(dict(variables)).encode()
    _table(address).internal_kv_put(key.encode(), text, True, namespace=_NAMESPACE)
    return key


def remove(key: str, address: str) -> None:
    """Take back what no job will come for."""
    _table(address).internal_kv_del(key.encode(), False, namespace=_NAMESPACE)


def take() -> None:
    """Move what was left for this process, if anything was, into its environment.

    Raises:
        RetryableError: it is not there any more.
    """
    if not (key := os.environ.pop(KEY_VARIABLE, "")):
        return
    address = os.environ["RAY_ADDRESS"]  # Ray sets it for every job
    table = _table(address)
    text = table.internal_kv_get(key.encode(), namespace=_NAMESPACE)
    if text is None:
        raise RetryableError(
            f"the settings of this job are not with the cluster's head at {address} any more: the "
            "head was restarted, or the job was; the run that waits for it submits another"
        )
    table.internal_kv_del(key.encode(), False, namespace=_NAMESPACE)
    os.environ.update(json.loads(text))


def _table(address: str) -> Any:
    """The head's table, as Ray's own command line finds the dashboard's address in it."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, its stub is short

    return GcsClient(address=address)
