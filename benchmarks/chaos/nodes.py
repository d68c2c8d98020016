"""A Ray cluster of several nodes on this machine, of which any may be lost."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil

from benchmarks.chaos import processes

NODE_CPUS = 2
START_ATTEMPTS = 3
# How soon a dead node is noticed: seconds in place of half a minute. Set before the nodes start.
FAILURE_DETECTION = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}


@dataclass
class Nodes:
    """A head without CPUs, where drivers attach, and nodes that do the work."""

    cluster: Any

    @property
    def address(self) -> str:
        """What RAY_ADDRESS must say."""
        return str(self.cluster.address)

    def pids(self) -> list[int]:
        """Processes that Ray started for its nodes."""
        nodes = [self.cluster.head_node, *self.cluster.worker_nodes]
        return [pid for node in nodes for pid in _pids(node)]

    def kill_one(self, chance: random.Random, *, with_workers: bool) -> list[psutil.Process]:
        """SIGKILL a node that works; another takes its place, as where nodes are lent.

        Args:
            with_workers: the machine is gone. Else only Ray's own process dies, and workers go on
                until they notice: what they publish meanwhile comes late.

        Returns:
            The processes that were on it.
        """
        node = chance.choice(sorted(self.cluster.worker_nodes, key=lambda one: one.unique_id))
        members = processes.family(_pids(node))
        if with_workers:
            processes.kill(members)
        self.cluster.remove_node(node, allow_graceful=False)
        time.sleep(chance.uniform(0.0, 3.0))
        self.cluster.add_node(num_cpus=NODE_CPUS)
        return members

    def kill_all(self) -> list[psutil.Process]:
        """SIGKILL head and nodes; a new cluster of as many nodes is there afterwards."""
        members, num_nodes = processes.family(self.pids()), len(self.cluster.worker_nodes)
        processes.kill(members)
        self.cluster.shutdown()
        self.cluster = _start(num_nodes)
        return members


@contextmanager
def ray_nodes(num_nodes: int = 2) -> Iterator[Nodes]:
    """Start the cluster; ends every process of it."""
    before = {name: os.environ.get(name) for name in FAILURE_DETECTION}
    os.environ.update(FAILURE_DETECTION)
    nodes = Nodes(_start(num_nodes))
    try:
        yield nodes
    finally:
        nodes.cluster.shutdown()
        for name, text in before.items():
            if text is None:
                del os.environ[name]
            else:
                os.environ[name] = text


def _start(num_nodes: int) -> Any:
    """Start head and nodes; on a busy machine with cold caches Ray's own deadlines can pass."""
    from ray.cluster_utils import Cluster

    for attempt in range(1, START_ATTEMPTS + 1):
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=0, include_dashboard=False)
            for _ in range(num_nodes):
                cluster.add_node(num_cpus=NODE_CPUS)
            return cluster
        except Exception:  # Ray raises the bare class when a process of its own is late
            cluster.shutdown()
            if attempt == START_ATTEMPTS:
                raise
    raise AssertionError("the last round returns or raises")


def _pids(node: Any) -> list[int]:
    """What Ray started for a node: its raylet and agents; on the head the control service too."""
    return [one.process.pid for many in node.all_processes.values() for one in many]
