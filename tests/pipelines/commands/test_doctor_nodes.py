"""Tests of pipelines.commands.doctor_nodes: a real cluster of two nodes, and none at all."""

import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.doctor import NodeNeeds
from pipelines.commands.doctor_nodes import check_nodes

NEEDS = NodeNeeds(disk_path=Path("/tmp"), shared_memory_gib=0.01, free_disk_gib=0.01)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of two nodes on loopback."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        two = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        try:
            two.add_node(num_cpus=1)
            yield two.address
        finally:
            two.shutdown()


@pytest.mark.slow
def test_nodes_agree_see_the_store_and_talk(cluster: str, tmp_path: Path) -> None:
    """Versions, the store, the machines, and a sum over gloo that every node had a part in."""
    needs = replace(NEEDS, weights={"t5": "package:json"})
    nodes, store, machines, talk = check_nodes(cluster, str(tmp_path), needs, deadline_s=250)
    assert nodes.ok, nodes.found
    assert nodes.found.startswith("2 with python ")
    assert (store.name, store.ok) == ("store on nodes", True), store.found
    assert (machines.name, machines.ok) == ("machines", True), machines.found
    assert "shared memory, accelerators, free disk, weights of t5" in machines.found
    assert (talk.name, talk.ok) == ("gloo on nodes", True), talk.found
    assert talk.found.startswith("2 workers on 2 nodes met within ")
    assert list((tmp_path / ".scratch").iterdir()) == []


@pytest.mark.slow
def test_a_node_that_lacks_something_is_named(cluster: str, tmp_path: Path) -> None:
    """What the doctor finds wrong on a node, with its remedy."""
    needs = replace(NEEDS, free_disk_gib=1e9, weights={"t5": "package:no_such_module_anywhere"})
    findings = check_nodes(cluster, str(tmp_path), needs, deadline_s=250)
    wrong = [one for one in findings if not one.ok]
    assert [one.name.partition(" of ")[0] for one in wrong] == ["free disk", "weights"] * 2
    assert socket.gethostname() in wrong[0].name
    assert "no_such_module_anywhere" in wrong[1].remedy


@pytest.mark.slow
def test_a_cluster_that_is_silent_is_given_up(cluster: str, tmp_path: Path) -> None:
    """The deadline ends the question, whatever Ray waits for."""
    start = time.monotonic()
    (nodes,) = check_nodes(cluster, str(tmp_path), NEEDS, deadline_s=0.5)
    assert time.monotonic() - start < 30
    assert not nodes.ok
    assert nodes.found == "no answer within 0.5 s"


def test_nobody_listens(tmp_path: Path) -> None:
    """Told at once, with both addresses to look at."""
    start = time.monotonic()
    (nodes,) = check_nodes("127.0.0.1:1", str(tmp_path), NEEDS)
    assert time.monotonic() - start < 10
    assert not nodes.ok
    assert "nobody listens at 127.0.0.1:1" in nodes.found
    assert "RAY_ADDRESS" in nodes.remedy


@pytest.mark.slow
def test_what_listens_is_no_cluster(tmp_path: Path) -> None:
    """Ray's own last words are told, or that it never answered, and what to compare."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        (nodes,) = check_nodes(address, str(tmp_path), NEEDS, deadline_s=10)
    assert not nodes.ok
    assert nodes.remedy
