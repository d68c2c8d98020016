"""Joining and starting clusters, and refusing what would wait for ever."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import pytest

from pipelines.driver import ray_cluster
from pipelines.errors import RetryableError, UserError
from pipelines.recipe import Resources


class FakeRay:
    """Stands in for the module: Ray's own slow starts cannot be had on demand."""

    def __init__(self, failures: Sequence[Exception], nodes: Sequence[Any] = ()) -> None:
        self.failures, self.starts, self._nodes = list(failures), [], nodes

    def init(self, **options: Any) -> None:
        self.starts.append(options["address"])
        if self.failures:
            raise self.failures.pop(0)

    def shutdown(self) -> None:
        self.starts.append("shutdown")

    def nodes(self) -> Sequence[Any]:
        return self._nodes


def test_a_late_start_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that was too slow to start is shut down and started afresh."""
    fake = FakeRay([Exception("The current node timed out during startup.")])
    monkeypatch.setattr(ray_cluster, "ray", fake)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray_cluster.connect()
    assert fake.starts == ["local", "shutdown", "local"]


def test_no_start_at_all_is_retryable(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last attempt the error says what Ray said, and that running again may help."""
    monkeypatch.setattr(ray_cluster, "ray", FakeRay([Exception("late")] * 3))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(RetryableError, match="did not start on this machine: late"):
        ray_cluster.connect()


def test_a_cluster_that_turns_us_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody listens at RAY_ADDRESS, but lets nobody in; no other cluster is started."""
    fake = FakeRay([ConnectionError("refused")])
    monkeypatch.setattr(ray_cluster, "ray", fake)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(RetryableError, match=rf"RAY_ADDRESS={address}: refused"):
            ray_cluster.connect()
    assert fake.starts == [address]


def test_a_missing_cluster_is_told_without_asking_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would try for minutes; a head that may be starting is given a while."""
    fake = FakeRay([])
    monkeypatch.setattr(ray_cluster, "ray", fake)
    monkeypatch.setattr(ray_cluster, "LISTENS_WITHIN_S", 0.5)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(RetryableError, match=r"127\.0\.0\.1:1: nobody listens there .*mend"):
        ray_cluster.connect()
    assert fake.starts == []


def test_a_head_that_is_just_starting_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It listens a second later than the driver looked."""
    fake = FakeRay([])
    monkeypatch.setattr(ray_cluster, "ray", fake)
    refusals = [ConnectionRefusedError("not yet"), None]
    monkeypatch.setattr(ray_cluster, "silence_at", lambda address: refusals.pop(0))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    ray_cluster.connect()
    assert fake.starts == ["127.0.0.1:1"]
    assert refusals == []


@pytest.mark.parametrize(
    ("resources", "num_workers", "words"),
    [
        (Resources(cpus=1), 7, "7 workers of 1 CPUs, but the cluster has 6"),
        (Resources(cpus=5), 1, "largest node 4"),
        (Resources(gpus=1), 1, "1 GPUs, but the cluster has 0"),
    ],
)
def test_too_large_a_unit_is_refused(
    monkeypatch: pytest.MonkeyPatch, resources: Resources, num_workers: int, words: str
) -> None:
    """More than the cluster has, or a worker that fits on no node, is an error at once."""
    nodes = [{"Alive": True, "Resources": {"CPU": num}} for num in (2, 4)]
    nodes.append({"Alive": False, "Resources": {"CPU": 64, "GPU": 8}})
    monkeypatch.setattr(ray_cluster, "ray", FakeRay([], nodes))
    ray_cluster.check_room("embed/t5", Resources(cpus=4), 1)
    with pytest.raises(UserError, match=r"resources\.embed: .*") as caught:
        ray_cluster.check_room("embed/t5", resources, num_workers)
    assert words in str(caught.value)


def node(group: str = "", **resources: float) -> Any:
    labels = {"ray.io/node-group": group} if group else {}
    return {"Alive": True, "Resources": resources, "Labels": labels}


@pytest.mark.parametrize(
    ("resources", "num_workers", "words"),
    [
        (Resources(node_group="big"), 1, "node_group: no node .*=big; its groups: large, small"),
        (Resources(cpus=3, node_group="small"), 1, "the cluster has 2 and its largest node 2"),
        (Resources(memory_gib=9), 1, "1 workers of 9 GiB of memory, .* has 8 .*; .* memory_gib"),
        (Resources(custom={"disk": 2}), 1, r"2 disk, but the cluster has 1 .* or custom\.disk"),
        (Resources(placement="strict_spread"), 3, "placement: strict_spread takes 3 nodes, .* 2"),
        (Resources(placement="strict_pack"), 5, "strict_pack takes one node with room for 5"),
    ],
)
def test_every_wish_is_looked_at_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, resources: Resources, num_workers: int, words: str
) -> None:
    """Groups of nodes, memory, resources of one's own, placement: the field is named."""
    nodes = [node("small", CPU=2), node("large", CPU=4, memory=8 * 2**30, disk=1)]
    monkeypatch.setattr(ray_cluster, "ray", FakeRay([], nodes))
    fitting = Resources(memory_gib=8, custom={"disk": 1}, node_group="large")
    ray_cluster.check_room("base", fitting, 1)
    ray_cluster.check_room("base", Resources(placement="strict_spread"), 2)
    ray_cluster.check_room("base", Resources(placement="strict_pack"), 4)
    with pytest.raises(UserError, match=rf"resources\.base.*{words}"):
        ray_cluster.check_room("base", resources, num_workers)


def test_actors_get_what_the_recipe_says() -> None:
    """What is not asked for is not named, so that Ray's own defaults hold."""
    assert ray_cluster.actor_options(Resources()) == {"num_cpus": 1, "num_gpus": 0}
    asked = Resources(gpus=1, memory_gib=0.5, custom={"disk": 2}, node_group="large")
    assert ray_cluster.actor_options(asked) == {
        "num_cpus": 1,
        "num_gpus": 1,
        "memory": 2**29,
        "resources": {"disk": 2},
        "label_selector": {"ray.io/node-group": "large"},
    }
