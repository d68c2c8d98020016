"""What `ediffi doctor` asks of a running cluster: do its nodes agree, and can they talk?

A process of its own asks, since a cluster that is ill may let it wait for ever: after a deadline it
is ended. On each node an actor tells its versions, its clock, whether it sees the store, and what
the doctor finds there; then all of them add up a number together, over NCCL where each has a GPU,
else over gloo.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from cluster.doctor import TIMEOUT_S, Finding, NodeNeeds, check_clock, examine_node, reason
from pipelines.driver.ray_address import silence_at
from pipelines.store.location import location, write_atomically

DEADLINE_S = 180.0
REDUCE_S = 60.0  # of the deadline: connecting, and adding up
MAX_NODES = 64
PACKAGES = ("ray", "torch")
_GROUP = (
    "open all ports between the nodes; if they have several networks, name the right interface in "
    "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME where the nodes are started"
)


def check_nodes(
    address: str, store: str, needs: NodeNeeds, *, deadline_s: float = DEADLINE_S
) -> list[Finding]:
    """Ask the cluster at RAY_ADDRESS, for so long at most."""
    unreachable = _check_listening(address)
    if unreachable is not None:
        return [unreachable]
    asked = json.dumps(asdict(needs), default=str)
    command = [sys.executable, "-m", "pipelines.commands.doctor_nodes", store, asked]
    environment = {**os.environ, "RAY_ADDRESS": address}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=deadline_s
        )
    except subprocess.TimeoutExpired:
        found = f"no answer within {deadline_s:g} s"
        remedy = "see `ray status`: its GPUs may be taken, or a node may hang"
        return [Finding(name="nodes", ok=False, found=found, remedy=remedy)]
    last = (done.stdout.strip().splitlines() or [""])[-1]
    try:
        return [Finding(**one) for one in json.loads(last)]
    except ValueError:
        words = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        remedy = "compare RAY_ADDRESS, RAY_AUTH_MODE and the token on both sides; see `ray status`"
        return [Finding(name="nodes", ok=False, found=f"{address}: {words}", remedy=remedy)]


def _check_listening(address: str) -> Finding | None:
    if (silence := silence_at(address, TIMEOUT_S)) is None:
        return None
    remedy = "start the cluster (`ray start --head`), or mend RAY_ADDRESS"
    found = f"nobody listens at {address}: {reason(silence)}"
    return Finding(name="nodes", ok=False, found=found, remedy=remedy)


# -- what the process does ------------------------------------------------------------------------


class Visitor:
    """An actor on one node."""

    def facts(self, probe: str) -> dict[str, Any]:
        """Versions, the time here, whether the probe can be read."""
        try:
            sees = location(probe).read_text() == "probe"
        except Exception:  # whatever it is, this node does not see it
            sees = False
        return {
            "host": f"{socket.gethostname()} ({_own_address()})",
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
            "time": time.time(),
            "sees_store": sees,
        }

    def examine(self, needs: NodeNeeds) -> tuple[str, list[Finding]]:
        """This node's name, and what the doctor finds here."""
        return f"{socket.gethostname()} ({_own_address()})", examine_node(needs)

    def free_address(self) -> str:
        """Where the others can meet this node."""
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        return f"tcp://{_own_address()}:{port}"

    def add_up(self, rank: int, num_ranks: int, address: str, backend: str) -> float:
        """The sum of 1 to `num_ranks`, added up by all."""
        import torch
        import torch.distributed as dist

        dist.init_process_group(
            backend,
            init_method=address,
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=REDUCE_S),
        )
        try:
            device = "cuda" if backend == "nccl" else "cpu"
            number = torch.tensor([rank + 1.0], device=device)
            dist.all_reduce(number)
            return float(number.item())
        finally:
            dist.destroy_process_group()


def visit(store: str, needs: NodeNeeds) -> list[Finding]:
    """Ask every node of the cluster that this process has joined."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]][:MAX_NODES]
    has_gpus = all(node["Resources"].get("GPU", 0) >= 1 for node in nodes)
    # one node has two visitors: the way between them is tried all the same
    places = [node["NodeID"] for node in nodes] * (2 if len(nodes) == 1 else 1)
    backend = "nccl" if has_gpus and len(nodes) > 1 else "gloo"
    remote = ray.remote(Visitor)
    visitors = [
        remote.options(
            num_cpus=0,
            num_gpus=1 if backend == "nccl" else 0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(place, soft=False),
        ).remote()
        for place in places
    ]
    first = visitors[: len(nodes)]
    num_accelerators = [int(node["Resources"].get("GPU", 0)) for node in nodes]
    return [
        *_agree(first, store),
        *_machines(first, needs, num_accelerators),
        _can_talk(visitors, backend, len(nodes)),
    ]


def _machines(visitors: list[Any], needs: NodeNeeds, num_accelerators: list[int]) -> list[Finding]:
    """What is wrong on some node, each by its name; else one line that says what was asked."""
    import ray

    told = ray.get(
        [
            visitor.examine.remote(replace(needs, num_accelerators=num))
            for visitor, num in zip(visitors, num_accelerators)
        ]
    )
    wrong = [
        replace(one, name=f"{one.name} of {host}")
        for host, findings in told
        for one in findings
        if not one.ok
    ]
    asked = ", ".join(one.name for one in told[0][1])
    found = f"{asked}: as they must be on {len(told)}"
    return wrong or [Finding(name="machines", ok=True, found=found)]


def _agree(visitors: list[Any], store: str) -> list[Finding]:
    import ray

    probe = location(store) / ".scratch" / f"doctor-{os.getpid()}-{time.time_ns()}"
    write_atomically(probe, "probe")
    try:
        before = time.time()
        facts = ray.get([visitor.facts.remote(str(probe)) for visitor in visitors])
        after = time.time()
    finally:
        probe.unlink(missing_ok=True)
    clocks = [check_clock(f"clock of {one['host']}", one["time"], before, after) for one in facts]
    wrong_clocks = [clock for clock in clocks if not clock.ok]
    return [_versions(facts), _see_store(facts, store), *wrong_clocks]


def _versions(facts: list[dict[str, Any]]) -> Finding:
    ours = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    wrong = [
        f"{one['host']} has {name} {one[name] or 'not at all'}"
        for one in facts
        for name in ours
        if one[name] != ours[name]
    ]
    mine = ", ".join(f"{name} {version}" for name, version in ours.items())
    found = f"{len(facts)} with {mine}" if not wrong else f"{'; '.join(wrong)}; here {mine}"
    remedy = "install requirements.lock on every node, or give all the same image" if wrong else ""
    return Finding(name="nodes", ok=not wrong, found=found, remedy=remedy)


def _see_store(facts: list[dict[str, Any]], store: str) -> Finding:
    blind = [one["host"] for one in facts if not one["sees_store"]]
    found = f"{store} is not seen by {', '.join(blind)}" if blind else "seen by every node"
    remedy = (
        "mount it under the same path on every node, or use a bucket; for a bucket give the nodes "
        "AWS_ENDPOINT_URL and credentials"
    )
    return Finding(name="store on nodes", ok=not blind, found=found, remedy=remedy if blind else "")


def _can_talk(visitors: list[Any], backend: str, num_nodes: int) -> Finding:
    import ray

    name, num = f"{backend} on nodes", len(visitors)
    start = time.monotonic()
    try:
        address = ray.get(visitors[0].free_address.remote())
        sums = ray.get(
            [
                visitor.add_up.remote(rank, num, address, backend)
                for rank, visitor in enumerate(visitors)
            ],
            timeout=2 * REDUCE_S,
        )
    except Exception as error:  # of torch, of NCCL, of Ray
        words = str(error).strip().splitlines()[-1] if str(error) else type(error).__name__
        return Finding(name=name, ok=False, found=words, remedy=_GROUP)
    if set(sums) != {num * (num + 1) / 2}:
        return Finding(name=name, ok=False, found=f"they added up to {sums}", remedy=_GROUP)
    found = f"{num} workers on {num_nodes} nodes met within {time.monotonic() - start:.1f} s"
    return Finding(name=name, ok=True, found=found)


def _own_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""


def main() -> None:
    """Print the findings as one line of JSON."""
    from pipelines.driver.ray_cluster import connect, disconnect

    connect()
    # what a node imports is this module by its own name, not `__main__`
    from pipelines.commands import doctor_nodes

    asked = json.loads(sys.argv[2])
    needs = NodeNeeds(**{**asked, "disk_path": Path(asked["disk_path"])})
    findings = doctor_nodes.visit(sys.argv[1], needs)
    print(json.dumps([asdict(one) for one in findings]), flush=True)
    disconnect()


if __name__ == "__main__":
    main()
