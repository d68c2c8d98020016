"""The Ray cluster a run uses: one that is there, or one on this machine for as long as it takes."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray

from pipelines.driver.ray_address import silence_at
from pipelines.errors import RetryableError, UserError
from pipelines.recipe_sections.resources import Resources

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
NODE_GROUP_LABEL = "ray.io/node-group"  # KubeRay sets it; elsewhere `ray start --labels` does
START_ATTEMPTS = 3  # on a busy machine with cold caches Ray's own deadlines can pass
LOOPBACK = "127.0.0.2"  # Ray replaces 127.0.0.1 by the address that others reach this machine by


# Ray's own end of a driver whose cluster has lost its head comes later than ours, see `head_watch`.
_PATIENT_WITH_HEAD = ("RAY_gcs_rpc_server_reconnect_timeout_s", "300")
DISCONNECT_S = 10.0
LISTENS_WITHIN_S = 15.0  # a head that was named


def is_joined() -> bool:
    """Whether the cluster is others', rather than started for this run."""
    return bool(os.environ.get("RAY_ADDRESS"))


def disconnect() -> None:
    """Leave the cluster, or end the one on this machine; does not wait for one that is gone.

    Nothing is garbage-collected meanwhile: if a collection, in whatever thread, finds a forgotten
    reference to a result while Ray takes down its part of this process, Ray ends it with code 1.
    """
    if not is_joined():
        _kill_autoscaler()
    collects = gc.isenabled()
    gc.disable()
    ending = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
    ending.start()
    ending.join(DISCONNECT_S)
    if ending.is_alive():
        atexit.unregister(ray.shutdown)  # it would wait again
    elif collects:
        gc.enable()


def _kill_autoscaler() -> None:
    """End the one process of our cluster that, asked by Ray, takes all the second it is given.

    On one machine there is nothing for it to scale.
    """
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it may just have ended
            if any(Path(word).match("autoscaler/*/monitor.py") for word in child.cmdline()):
                child.kill()


def connect() -> None:
    """Join the cluster named by RAY_ADDRESS, or start one on this machine.

    Raises:
        RetryableError: no cluster could be joined or started.
    """
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address := os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault(*_PATIENT_WITH_HEAD)
        try:
            _await_listener(address)
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


def _await_listener(address: str) -> None:
    """Give a head that is just starting some time.

    Raises:
        ConnectionError: nobody listens there.
    """
    deadline = time.monotonic() + LISTENS_WITHIN_S
    while (silence := silence_at(address)) is not None:
        if time.monotonic() > deadline:
            raise ConnectionError(
                f"nobody listens there ({silence}); start it (`ray start --head`), or mend "
                "RAY_ADDRESS"
            )
        time.sleep(1)


# -- what a unit takes ----------------------------------------------------------------------------


def wanted(resources: Resources) -> dict[str, float]:
    """What one worker of a unit takes, by Ray's names."""
    asked = {"CPU": resources.cpus, "GPU": resources.gpus, **resources.custom}
    asked["memory"] = resources.memory_gib * 2**30  # in bytes
    return {kind: each for kind, each in asked.items() if each or kind == "CPU"}


def label_selector(resources: Resources) -> dict[str, str]:
    """Which nodes a unit's workers may go to; empty: any."""
    return {NODE_GROUP_LABEL: resources.node_group} if resources.node_group else {}


def actor_options(resources: Resources) -> dict[str, Any]:
    """The same as Ray's actors are given it."""
    options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
    if resources.memory_gib:
        options["memory"] = int(resources.memory_gib * 2**30)
    if resources.custom:
        options["resources"] = dict(resources.custom)
    if selector := label_selector(resources):
        options["label_selector"] = selector
    return options


def check_room(stage: str, resources: Resources, num_workers: int) -> None:
    """Refuse at once what would wait for ever.

    Raises:
        UserError: a unit takes more than the cluster has, or a worker more than any node has.
    """
    where = f"resources.{stage.split('/')[0]}"
    nodes = nodes_of(resources.node_group)
    if not nodes:
        labels = [node.get("Labels", {}) for node in ray.nodes() if node["Alive"]]
        groups = sorted({found.get(NODE_GROUP_LABEL, "") for found in labels} - {""})
        raise UserError(
            f"{where}.node_group: no node of the cluster is labelled {NODE_GROUP_LABEL}="
            f"{resources.node_group}; its groups: {', '.join(groups) or 'none'}"
        )
    for kind, each in wanted(resources).items():
        total = sum(node.get(kind, 0) for node in nodes)
        largest = max(node.get(kind, 0) for node in nodes)
        if each * num_workers > total or each > largest:
            raise UserError(
                f"{where}: a unit takes {num_workers} workers of {_amount(kind, each)}, but the "
                f"cluster has {_number(kind, total)} and its largest node "
                f"{_number(kind, largest)}; lower num_workers or {_field(kind)}"
            )
    if num_workers > len(nodes) and resources.placement == "strict_spread":
        raise UserError(
            f"{where}.placement: strict_spread takes {num_workers} nodes, a worker on each, but "
            f"the cluster has {len(nodes)}; lower num_workers or take 'spread'"
        )
    if num_workers > 1 and resources.placement == "strict_pack":
        _check_pack(where, resources, num_workers, nodes)


def _check_pack(
    where: str, resources: Resources, num_workers: int, nodes: Sequence[Mapping[str, float]]
) -> None:
    asked = wanted(resources)
    if not any(
        all(node.get(kind, 0) >= num_workers * each for kind, each in asked.items())
        for node in nodes
    ):
        raise UserError(
            f"{where}.placement: strict_pack takes one node with room for {num_workers} workers of "
            f"{_words(asked)}, but no node has it; lower num_workers or take 'pack'"
        )


def free_and_asked(resources: Resources, num_workers: int) -> str:
    """Words for a unit that found no workers: what it asked for, and what is free now."""
    free = ray.available_resources()
    asked = wanted(resources)
    group = f" on nodes of group {resources.node_group}" if resources.node_group else ""
    num_nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    return (
        f"asked for {num_workers} workers of {_words(asked)}{group}; the cluster, of {num_nodes} "
        f"nodes, has free {_words({kind: free.get(kind, 0.0) for kind in asked})}"
    )


def nodes_of(group: str) -> list[Mapping[str, float]]:
    """What each living node of a group has in all, by Ray's names; of every node for ""."""
    return [
        node["Resources"]
        for node in ray.nodes()
        if node["Alive"] and (not group or node.get("Labels", {}).get(NODE_GROUP_LABEL) == group)
    ]


def _words(amounts: Mapping[str, float]) -> str:
    return ", ".join(_amount(kind, each) for kind, each in amounts.items())


def _amount(kind: str, each: float) -> str:
    names = {"CPU": "CPUs", "GPU": "GPUs", "memory": "GiB of memory"}
    return f"{_number(kind, each)} {names.get(kind, kind)}"


def _number(kind: str, each: float) -> str:
    return f"{each / 2**30 if kind == 'memory' else each:.4g}"


def _field(kind: str) -> str:
    return {"CPU": "cpus", "GPU": "gpus", "memory": "memory_gib"}.get(kind, f"custom.{kind}")
