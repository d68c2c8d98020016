"""Ray on several hosts that meet in a network: one is killed, one is cut off and comes late."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.failure_detection import failure_detection
from tests.infra.hosts import Host, several_hosts, what_is_missing
from tests.infra.watched_project import DEADLINE_S, WatchedProject, wait_until

MISSING = what_is_missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]

NODE_LOSS_S = 8
PORT = 6379
START_ATTEMPTS = 3  # on a busy machine a node may need longer than Ray has patience
UNITS, ATTEMPTS = "abcd", 5  # as in the recipe
NUM_CPUS = (0, 1, 1, 2)  # of each host: the head takes no unit, the last host two
# A node that cannot reach the head ends itself; here it shall live to try its late publish.
CUT_OFF_LIVES_S = 600


@pytest.fixture
def environment() -> dict[str, str]:
    """What every node and the driver share: a secret of their own, and how soon a node is lost."""
    return {
        **failure_detection(NODE_LOSS_S),
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(CUT_OFF_LIVES_S),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Four of them: the first is to be the head."""
    with several_hosts(4) as hosts:
        yield hosts


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """A short path: Ray's sockets lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_killed_and_cut_off_nodes(
    ray_folder: Path, hosts: list[Host], environment: dict[str, str], tmp_path: Path
) -> None:
    """Both their units are given out again; what the cut-off worker publishes late is refused."""
    project = WatchedProject.make(tmp_path / "project")
    environment |= project.environment
    log = tmp_path / "driver.log"
    start_ray(hosts, environment, ray_folder, tmp_path)
    address = {"RAY_ADDRESS": f"{hosts[0].address}:{PORT}"}
    # A unit that asks whether to end would hear of the fence: these find it when they publish.
    command = (*project.command, "--set", "custom_stages.watched.config.asks=false")
    driver = hosts[0].start(
        command, environment=environment | address, log=log, directory=project.path
    )
    _, killed, cut, spared = hosts
    wait_until("four units began", lambda: all(map(project.begun, UNITS)), log)
    where = {unit: project.begun(unit)[0] for unit in UNITS}
    on = {
        host.name: [unit for unit in UNITS if where[unit]["address"] == host.address]
        for host in hosts
    }
    (lost,), (late,), (first, last) = on[killed.name], on[cut.name], on[spared.name]
    scratch = Path(where[late]["scratch"])

    killed.kill()
    cut.cut_off()
    project.let_go(first)
    for unit in (lost, late):  # an attempt may go to the other host before that is missed too
        for attempt in range(2, ATTEMPTS + 1):
            project.let_go(unit, attempt)
    wait_until("the killed unit was done elsewhere", lambda: project.receipt(lost), log)
    wait_until("the cut-off unit was done elsewhere", lambda: project.receipt(late), log)
    assert scratch.exists(), "the cut-off worker has ended before it could come late"
    before = project.receipt(late)
    again = before["attempt"]
    assert project.begun(late, again)[0]["address"] == spared.address

    project.let_go(late)
    wait_until("the late attempt ended", lambda: not scratch.exists(), log)
    assert any(one.pid == where[late]["pid"] for one in cut.processes())
    assert project.receipt(late) == before
    assert project.published(late) == f"attempt {again}\n"

    project.let_go(last)
    assert driver.wait(timeout=DEADLINE_S) == 0, log.read_text()
    assert project.is_finished
    is_again = {unit: project.receipt(unit)["attempt"] > 1 for unit in UNITS}
    assert is_again == {lost: True, late: True, first: False, last: False}


def start_ray(
    hosts: list[Host], environment: dict[str, str], folder: Path, log_folder: Path
) -> None:
    """A head on the first host, and a node on every other, one after the other."""
    head = f"{hosts[0].address}:{PORT}"
    role = ["--head", f"--port={PORT}", "--include-dashboard=false"]
    for place, (host, num_cpus) in enumerate(zip(hosts, NUM_CPUS)):
        options = role if place == 0 else [f"--address={head}"]
        more = [f"--temp-dir={folder / str(place)}", f"--node-ip-address={host.address}", "--block"]
        size = [f"--num-cpus={num_cpus}", "--object-store-memory=100000000"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start"]
        command = [*ray, *options, *more, *size, "--disable-usage-stats"]
        log = log_folder / f"ray-{place}.log"
        for attempt in range(1, START_ATTEMPTS + 1):
            node = host.start(command, environment=environment, log=log)
            wait_until(f"node {place} runs or gives up", _is_decided(node, log), log)
            if node.poll() is None:
                break
            assert attempt < START_ATTEMPTS, log.read_text()


def _is_decided(node: subprocess.Popen[str], log: Path) -> Callable[[], bool]:
    return lambda: "Ray runtime started" in log.read_text() or node.poll() is not None
