"""Kill and fail at random moments, give the same command again: the bytes come out equal.

`python -m benchmarks.chaos` does the same to the whole pipeline, fifty times.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from subprocess import Popen

import pytest

from benchmarks.chaos import audit, outcome, processes
from benchmarks.chaos.attack import Attack
from benchmarks.chaos.bucket import s3_bucket
from benchmarks.chaos.nodes import ray_nodes
from benchmarks.chaos.scene import MAX_UNITS_AT_ONCE
from benchmarks.chaos.witness import Witness
from pipelines.store.ledger import Ledger
from tests.chaos.conftest import Calm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DEADLINE_S = 300


@pytest.fixture
def start(calm: Calm) -> Iterator[Callable[[str, Path], Popen[bytes]]]:
    """Call it with a store and a place to begin a run; what still runs after the test is ended."""
    drivers: list[Popen[bytes]] = []

    def begin(store: str, place: Path) -> Popen[bytes]:
        drivers.append(calm.scene.start(store, place))
        return drivers[-1]

    yield begin
    for driver in drivers:
        if driver.poll() is None:
            processes.kill(processes.family([driver.pid]))
        driver.wait()


def found(attack: Attack, calm: Calm) -> list[str]:
    """All that is not as it should be after an attack."""
    ledger = Ledger.at(attack.store)
    begun, units = audit.num_begun(ledger), audit.num_units(ledger)
    lines = audit.problems(ledger, attack.place, calm.digests)
    return [*lines, *outcome.unexplained(attack, begun, units)]


def attack(calm: Calm, place: Path, kinds: Sequence[str], seed: int) -> Attack:
    """An attack on a store beside the place where the command runs."""
    return Attack(
        scene=calm.scene,
        store=str(place / "store"),
        place=place,
        kinds=kinds,
        chance=random.Random(seed),
    )


def test_processes_that_are_killed_cost_what_was_in_flight(calm: Calm, tmp_path: Path) -> None:
    """The driver twice, an embedding actor, a training worker; nobody can tell afterwards."""
    one = attack(calm, tmp_path, ("driver", "actor", "trainer", "driver"), seed=1)
    one.run()
    assert {"driver", "actor"} <= {blow.kind for blow in one.blows}
    assert found(one, calm) == []


def test_nodes_that_are_lost_are_done_without(calm: Calm, tmp_path: Path) -> None:
    """A node with its workers, another whose workers go on for a while, then head and all."""
    one = attack(calm, tmp_path, ("node", "raylet", "head"), seed=2)
    with ray_nodes() as one.nodes:
        one.run()
        assert one.blows
        assert found(one, calm) == []


def test_a_bucket_that_fails_loses_nothing(calm: Calm, tmp_path: Path) -> None:
    """Requests are turned away, held up and cut off; the driver is killed between two outages."""
    one = attack(calm, tmp_path, ("busy", "driver", "stall", "cut"), seed=3)
    with s3_bucket(one.chance) as one.bucket:
        one.store = f"{one.bucket.url}/store"
        one.run()
        assert one.bucket.outage.num_spoilt > 0
        assert found(one, calm) == []


def test_a_driver_killed_when_all_is_done_leaves_no_orphan(
    calm: Calm, start: Callable[[str, Path], Popen[bytes]], tmp_path: Path
) -> None:
    """The next command finds everything finished, and closes what the killed one left open."""
    store = tmp_path / "store"
    driver = start(str(store), tmp_path)
    wait_for(lambda: any(store.glob("base/*/manifest.json")))
    driver.kill()
    driver.wait()
    calm.scene.run(str(store), tmp_path)
    assert audit.problems(Ledger.at(store), tmp_path, calm.digests) == []


def test_of_two_drivers_one_works_and_the_other_waits(
    calm: Calm, start: Callable[[str, Path], Popen[bytes]], tmp_path: Path
) -> None:
    """The second takes over when the first is killed; no unit is done twice."""
    store, places = tmp_path / "store", [tmp_path / name for name in ("first", "second")]
    with Witness(Ledger.open(store).store) as witness:
        first = start(str(store), places[0])
        wait_for(lambda: witness.num_receipts > 0)
        second = start(str(store), places[1])
        wait_for(lambda: "waits for it" in said(places[1]) or second.poll() is not None)
        assert first.poll() is None, "it was done before the second looked"
        first.kill()
        first.wait()
        assert second.wait(DEADLINE_S) == 0, said(places[1])
    calm.scene.run(str(store), places[0])  # the killed one is closed by the next that starts
    ledger = Ledger.at(store)
    assert witness.done_again == []
    assert audit.problems(ledger, places[1], calm.digests) == []
    assert audit.num_begun(ledger) <= audit.num_units(ledger) + MAX_UNITS_AT_ONCE


def test_two_drivers_that_both_live_do_each_unit_once(
    calm: Calm, start: Callable[[str, Path], Popen[bytes]], tmp_path: Path
) -> None:
    """Started at the same moment, both succeed, and every unit has been begun once."""
    store, places = tmp_path / "store", [tmp_path / name for name in ("first", "second")]
    with Witness(Ledger.open(store).store) as witness:
        drivers = [start(str(store), place) for place in places]
        codes = [driver.wait(DEADLINE_S) for driver in drivers]
    assert codes == [0, 0], [said(place) for place in places]
    ledger = Ledger.at(store)
    assert witness.done_again == []
    assert audit.problems(ledger, places[0], calm.digests) == []
    assert audit.num_begun(ledger) == audit.num_units(ledger)


def said(place: Path) -> str:
    """Everything a run has said so far."""
    path = place / "said.txt"
    return path.read_text() if path.exists() else ""


def wait_for(has_come: Callable[[], bool]) -> None:
    """Look until it is there."""
    deadline = time.monotonic() + DEADLINE_S
    while not has_come():
        assert time.monotonic() < deadline
        time.sleep(0.005)
