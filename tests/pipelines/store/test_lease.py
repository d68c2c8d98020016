"""Tests of pipelines.store.lease: one driver a stage, and nothing late from those before it."""

import json
import os
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from pipelines.errors import RetryableError, UserError
from pipelines.stage import Outcome, Unit
from pipelines.store import lease
from pipelines.store.lease import Fenced, Held, Lease
from pipelines.store.ledger import Ledger
from pipelines.store.location import Location, location, names_in, write_atomically
from pipelines.store.processes import Owner
from tests.pipelines.other_drivers import driver

ME = Owner.of_this_process("mine")
ELSEWHERE = Owner("theirs", "another-host", 1, 1.0, "another table")


@pytest.fixture(params=["file", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """The folder of a stage, in a directory and in a bucket."""
    if request.param == "file":
        return tmp_path / "first" / "f0"
    return location(request.getfixturevalue("s3_store")) / "first" / "f0"


def taken(directory: Location, owner: Owner = ME, ttl_s: float = 60.0) -> Lease:
    found = lease.acquire(directory, owner, ttl_s=ttl_s)
    assert isinstance(found, Lease), str(found)
    return found


def wait_until_taken(directory: Location, at_most_s: float) -> tuple[Lease, float]:
    """Ask until we have it; also how long that took."""
    started = time.monotonic()
    while time.monotonic() - started < at_most_s:
        found = lease.acquire(directory, ME)
        if isinstance(found, Lease):
            return found, time.monotonic() - started
        time.sleep(0.05)
    raise AssertionError(f"still held after {at_most_s} s: {found}")


# -- one holder -----------------------------------------------------------------------------------


def test_a_second_driver_is_told_who_holds_it(folder: Location) -> None:
    """With run, host and time; once it is let go the next token is higher by one."""
    with taken(folder) as mine:
        assert mine.token == 1
        held = lease.acquire(folder, ELSEWHERE)
        assert isinstance(held, Held)
        assert held.owner == ME
        assert str(held).startswith(f"run mine on {socket.gethostname()} (pid {os.getpid()}) since")
    with taken(folder) as again:
        assert again.token == 2
    assert names_in(folder / "lease") == ["00000002.json"]
    again.release()  # a second time does no harm
    assert lease.acquire(folder, ELSEWHERE).token == 3


def test_who_does_not_wait_is_told_what_to_do(folder: Location) -> None:
    """The error names the holder."""
    with taken(folder), pytest.raises(RetryableError, match=r"run mine on .* works there; run the"):
        lease.take(folder, ELSEWHERE)
    lease.take(folder, ELSEWHERE).release()


@pytest.mark.slow
@pytest.mark.parametrize("num_drivers", [8])
def test_of_many_drivers_one_gets_it(folder: Location, num_drivers: int) -> None:
    """Processes that ask at one moment; the others are told of the same token."""
    starts = str(time.time() + 4.0)
    with ExitStack() as stack:
        others = [
            stack.enter_context(driver("race", str(folder), starts)) for _ in range(num_drivers)
        ]
        told = [other.says() for other in others]
    assert [one["is_held_by_other"] for one in told].count(False) == 1
    assert {one["token"] for one in told} == {1}


@pytest.mark.slow
def test_turns_never_overlap(tmp_path: Path) -> None:
    """Processes that take it and let it go as fast as they can: tokens only grow, one at a time."""
    log, num_drivers, num_turns = tmp_path / "log", 4, 25
    with ExitStack() as stack:
        words = ("relay", str(tmp_path / "stage"), str(log), str(num_turns))
        others = [stack.enter_context(driver(*words)) for _ in range(num_drivers)]
        assert [other.says()["done"] for other in others] == [num_turns] * num_drivers
    lines = [line.split() for line in log.read_text().splitlines()]
    assert [verb for verb, _ in lines] == ["begin", "end"] * num_drivers * num_turns
    tokens = [int(token) for _, token in lines]
    assert tokens[::2] == tokens[1::2]
    assert tokens[::2] == sorted(set(tokens))


# -- taking over ----------------------------------------------------------------------------------


def test_a_dead_driver_of_this_machine_is_taken_over_from_at_once(folder: Location) -> None:
    """However long its lease would have lasted; also while nobody has asked for its exit code."""
    with driver("hold", str(folder), "here", "600") as other:
        assert other.says() == {"token": 1}
        assert isinstance(lease.acquire(folder, ME), Held)
        other.send(signal.SIGKILL)
        mine, waited_s = wait_until_taken(folder, at_most_s=10)
    assert mine.token == 2
    assert waited_s < 5
    mine.release()


def test_a_process_of_the_same_number_is_another(folder: Location) -> None:
    """A lease of this process's number, from before it started, is nobody's."""
    earlier = Owner("earlier", ME.host, ME.pid, ME.process_started - 1, ME.process_table)
    assert earlier.is_gone
    assert not ME.is_gone
    write_lease(folder, 7, earlier)
    with taken(folder) as mine:
        assert mine.token == 8


@pytest.mark.parametrize(
    "owner",
    [
        ELSEWHERE,
        Owner("theirs", ME.host, 2**22 + 1, 1.0, "the table of a container"),
        Owner("earlier version", ME.host, ME.pid, 1.0),
    ],
    ids=["another host", "another table", "unknown table"],
)
def test_a_driver_that_cannot_be_seen_is_no_dead_one(tmp_path: Path, owner: Owner) -> None:
    """Only its silence can tell."""
    assert not owner.is_gone
    write_lease(tmp_path, 1, owner)
    assert isinstance(lease.acquire(tmp_path, ME), Held)


def write_lease(folder: Location, token: int, owner: Owner, **values: object) -> None:
    """A holder's file, as another process left it."""
    document = {**vars(owner), "since": "", "ttl_s": 60.0, "beats": 0, "released": False, **values}
    write_atomically(folder / "lease" / f"{token:08d}.json", json.dumps(document))


@pytest.mark.slow
def test_a_heartbeat_keeps_it_and_silence_loses_it(folder: Location) -> None:
    """A driver on another host is not taken over from while it lives; killed, after its time."""
    with driver("hold", str(folder), "another-host", "5") as other:
        assert other.says() == {"token": 1}
        until = time.monotonic() + 8.0
        while time.monotonic() < until:
            assert isinstance(lease.acquire(folder, ME), Held)
            time.sleep(0.1)
        other.send(signal.SIGKILL)
        mine, waited_s = wait_until_taken(folder, at_most_s=60)
    assert mine.token == 2
    assert waited_s > 1.0  # it was silent for part of its time before our first look
    mine.release()


def test_a_lease_that_is_half_there_is_nobodys_after_a_while(tmp_path: Path) -> None:
    """A file system without links may show an empty file for a moment: not at once."""
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease" / "00000004.json").write_text("")
    held = lease.acquire(tmp_path, ME, ttl_s=0.3)
    assert isinstance(held, Held)
    assert "unknown" in str(held)
    time.sleep(0.4)
    assert lease.acquire(tmp_path, ME, ttl_s=0.3).token == 5


@pytest.mark.slow
def test_a_stopped_driver_is_fenced(folder: Location) -> None:
    """It goes on after its lease was taken over: it learns so, publishes nothing, stays fenced."""
    with driver("hold", str(folder), "here", "1") as other:
        assert other.says() == {"token": 1}
        other.send(signal.SIGSTOP)
        mine, _ = wait_until_taken(folder, at_most_s=60)
        other.send(signal.SIGCONT)
        other.let_go()
        assert other.says() == {"lost": True}
    with pytest.raises(Fenced, match=r"run mine on host .* has taken the stage over .*token 1"):
        lease.check(folder, 1)
    lease.check(folder, mine.token)
    mine.release()
    lease.check(folder, mine.token)  # let go, and nobody came: what was begun may be published
    assert names_in(folder / "lease") == ["00000002.json"]


@pytest.mark.slow
def test_a_frozen_worker_publishes_nothing_late(tmp_path: Path) -> None:
    """It wakes in the middle of a unit that another driver has done meanwhile."""
    ledger = Ledger.open(tmp_path / "store")
    record = ledger.stage("first", "f0")
    with driver("work", str(ledger.store), "f0") as other:
        assert other.says() == {"state": "stops"}
        mine, _ = wait_until_taken(record.directory, at_most_s=60)
        scratch = ledger.new_scratch()
        (scratch / "a.txt").write_text("in time")
        unit, outcome = Unit(id="a", key="k:1"), Outcome(files=["a.txt"])
        done = record.publish(unit, outcome, scratch, seconds=1, attempt=1, token=mine.token)
        other.send(signal.SIGCONT)
        said = other.says()
    assert "run mine on host" in said["fenced"]
    assert said["lost"]
    assert record.receipt("a") == done
    assert (record.directory / "a.txt").read_text() == "in time"
    assert list((tmp_path / "store" / ".scratch" / "sleeper").iterdir()) == []
    mine.release()


# -- publishing -----------------------------------------------------------------------------------


def test_only_the_last_attempt_at_a_unit_may_publish(folder: Location) -> None:
    """A unit given out again is fenced; other units and the next driver's attempts are not."""
    first = taken(folder)
    lease.fence(folder, "a", 2, token=first.token)
    lease.fence(folder, "a", 2, token=first.token)  # telling it twice does no harm
    with pytest.raises(Fenced, match="unit a was given out again after attempt 1"):
        lease.check(folder, first.token, "a", 1)
    lease.check(folder, first.token, "a", 2)
    lease.check(folder, first.token, "b", 1)
    lease.check(folder, first.token)
    first.release()
    second = taken(folder)
    lease.check(folder, second.token, "a", 1)
    assert names_in(folder / "lease" / "fences" / "a") == []
    lease.fence(folder, "a", 9, token=first.token)  # by a driver that does not know yet
    lease.check(folder, second.token, "a", 1)
    second.release()


def test_a_fence_that_is_no_fence_hinders_nobody(tmp_path: Path) -> None:
    """An earlier version took `x/y` for a unit's id: its fence lies one folder deeper."""
    for unit in ("x/y", "x/y-1"):
        lease.fence(tmp_path, unit, 2, token=1)
    first = taken(tmp_path)
    lease.check(tmp_path, first.token, "x", 1)
    first.release()
    taken(tmp_path).release()


def test_a_lease_that_was_removed_does_not_hold(tmp_path: Path) -> None:
    """As when the store was unmounted: nothing is written into what may be another place."""
    held = taken(tmp_path / "stage", ttl_s=0.6)
    (tmp_path / "stage").rename(tmp_path / "away")
    with pytest.raises(Fenced, match="its lease is gone"):
        lease.check(tmp_path / "stage", held.token)
    deadline = time.monotonic() + 10
    while not held.lost and time.monotonic() < deadline:
        time.sleep(0.05)
    assert held.lost
    assert not (tmp_path / "stage").exists()


def test_work_without_a_lease_is_not_guarded(tmp_path: Path) -> None:
    """Token 0 asks nobody."""
    with taken(tmp_path):
        lease.check(tmp_path, 0, "a", 1)


def test_a_store_without_exclusive_create_has_no_leases() -> None:
    """The error says what to use instead."""
    with pytest.raises(
        UserError, match=r"memory://.*use a directory that every node mounts, or s3"
    ):
        lease.acquire(location("memory://bucket/stage"), ME)


def test_what_a_killed_driver_held_is_let_go(tmp_path: Path) -> None:
    """With what it was writing there; a lease of anybody else stays as it is."""
    mine = taken(tmp_path)
    asides = [tmp_path / f".made.json.{'0' * 32}", tmp_path / f"lease/.00000001.json.{'1' * 32}"]
    for aside in (*asides, tmp_path / ".kept"):
        aside.touch()
    lease.let_go_of(tmp_path, "theirs")
    assert isinstance(lease.acquire(tmp_path, ELSEWHERE), Held)
    assert all(aside.exists() for aside in asides)
    lease.let_go_of(tmp_path, "mine")
    assert not any(aside.exists() for aside in asides)
    assert (tmp_path / ".kept").exists()
    assert taken(tmp_path, ELSEWHERE).token == mine.token + 1
    lease.let_go_of(tmp_path / "nobody was here", "mine")
