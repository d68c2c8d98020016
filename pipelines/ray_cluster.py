"""The Ray cluster a run uses: one that is there, or one on this machine for as long as it takes."""

from __future__ import annotations

import os
from typing import Any

import ray

from pipelines.errors import RetryableError, UserError
from pipelines.recipe import Resources

# Set, unless the user has, for the processes of a cluster on this machine before they start.
WORKER_ENVIRONMENT = {
    "NO_ALBUMENTATIONS_UPDATE": "1",  # img2dataset's dependency asks home for news at import
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    # of no use on one machine, and each costs a process or an exporter for every gang
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
START_ATTEMPTS = 3  # on a busy machine with cold caches Ray's own deadlines can pass
LOOPBACK = "127.0.0.2"  # Ray replaces 127.0.0.1 by the address that others reach this machine by


def connect() -> None:
    """Join the cluster named by RAY_ADDRESS, or start one on this machine.

    Raises:
        RetryableError: no cluster could be joined or started.
    """
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(address=address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise RetryableError(f"no Ray cluster at RAY_ADDRESS={address}: {error}") from error
        return
    for name, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options |= {"address": "local", "include_dashboard": False, "_node_ip_address": LOOPBACK}
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(**options)
        except Exception as error:  # Ray raises the bare class when a process of its own is late
            ray.shutdown()
            if attempt == START_ATTEMPTS:
                raise RetryableError(f"Ray did not start on this machine: {error}") from error
        else:
            return


def check_room(stage: str, resources: Resources, num_workers: int) -> None:
    """Refuse at once what would wait for ever.

    Raises:
        UserError: a unit takes more than the cluster has, or a worker more than any node has.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for kind, each in (("CPU", resources.cpus), ("GPU", resources.gpus)):
        total = sum(node.get(kind, 0) for node in nodes)
        largest = max(node.get(kind, 0) for node in nodes)
        if each * num_workers > total or each > largest:
            raise UserError(
                f"resources.{stage.split('/')[0]}: a unit takes {num_workers} workers of {each:g} "
                f"{kind}s, but the cluster has {total:g} and its largest node {largest:g}; "
                f"lower num_workers or {kind.lower()}s"
            )
