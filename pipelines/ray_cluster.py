"""The Ray cluster a run uses: one that is there, or one on this machine for as long as it takes."""

from __future__ import annotations

import os
from typing import Any

import ray

from pipelines.errors import UserError
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
LOOPBACK = "127.0.0.2"  # Ray takes 127.0.0.1 for "unknown" and listens on every interface instead


def connect() -> None:
    """Join the cluster named by RAY_ADDRESS, or start one on this machine."""
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if "RAY_ADDRESS" in os.environ:
        ray.init(address=os.environ["RAY_ADDRESS"], **options)
        return
    for name, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    ray.init(address="local", include_dashboard=False, _node_ip_address=LOOPBACK, **options)


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
