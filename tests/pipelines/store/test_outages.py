"""Tests of pipelines.store.outages: a store that fails says what is wrong and loses nothing."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import s3fs

from pipelines.errors import RetryableError, UserError
from pipelines.stage import Outcome, Unit, Workspace
from pipelines.store import pulse
from pipelines.store.ledger import Ledger
from pipelines.store.location import location
from pipelines.store.outages import as_retryable, why_it_failed
from pipelines.store.processes import Owner
from pipelines.worker.execute import Task, execute
from tests.conftest import S3_PORT
from tests.pipelines.failing_store import Faults, failing_store
from tests.pipelines.fake_stages import FakeStage


class Filling(FakeStage):
    """Leaves no room in the store while it works, all but what its own file takes."""

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        outcome = super().run(unit, workspace)
        with suppress(OSError), (workspace.scratch / "filling").open("wb", buffering=0) as stream:
            while True:
                stream.write(b"x" * 4096)
        return outcome


class Refused(FakeStage):
    """Loses its credentials while it works."""

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        outcome = super().run(unit, workspace)
        FAULTS[0].refuses = frozenset({"PUT", "POST", "DELETE"})
        return outcome


FAULTS: list[Faults] = []


def task(ledger: Ledger, stage: FakeStage) -> Task:
    return Task(
        store=str(ledger.store),
        stage=stage,
        fingerprint="f0",
        inputs={},
        unit=Unit(id="a", key="k:1"),
        run_id="run-1",
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def faults(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """The S3 server, reached through one that can fail."""
    with failing_store(S3_PORT) as (port, found):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        s3fs.S3FileSystem.clear_instance_cache()
        FAULTS[:] = [found]
        yield found
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_full_disk_is_named_and_nothing_is_half_published(small_disk: Path) -> None:
    """The unit has no receipt and its scratch is gone; with room the same command succeeds."""
    ledger = Ledger.open(small_disk / "store")
    first = task(ledger, Filling(name="first"))
    with pytest.raises(RetryableError, match=rf"first/a: {ledger.store}: no room is left there"):
        execute(first)
    assert first.record.receipt("a") is None
    assert not [path for path in small_disk.rglob("*") if path.name.startswith(".a.json")]
    assert list((ledger.store / ".scratch" / "run-1").iterdir()) == []
    receipt = execute(task(ledger, FakeStage(name="first")))
    assert receipt is not None
    assert first.record.holds(receipt)


def test_a_full_disk_stops_a_run_before_it_begins(small_disk: Path) -> None:
    """Creating a store there is refused with the reason; with room the same command goes on."""
    (small_disk / "filling").write_bytes(b"x" * 256 * 1024)
    with pytest.raises(RetryableError, match=r"store: .*no room is left there; make room"):
        Ledger.open(small_disk / "store")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_an_outage_at_the_start_is_no_mistake_of_the_user(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What may pass has the code of what may pass; what never was there is the user's to name."""

    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.store.ledger.write_atomically", fails)
        with pytest.raises(RetryableError, match=r"store: .*then run the same command"):
            Ledger.open(tmp_path / "store")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot create or write .*; name a directory .* --store"):
        Ledger.open(tmp_path / "file" / "store")


def test_credentials_lost_at_the_start_are_named(faults: Faults, s3_store: str) -> None:
    """By who opens the store for writing, and by who only looks."""
    faults.refuses = frozenset({"GET", "PUT", "HEAD"})
    for begin in (Ledger.open, Ledger.checked):
        with pytest.raises(RetryableError, match="refuses our credentials"):
            begin(s3_store)


def test_looking_at_runs_needs_no_right_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a driver elsewhere lives is then not known; another failure is told."""
    store = Ledger.open(tmp_path / "store").store
    alive = pulse.begin(store, Owner.of_this_process("run-1"))
    numbers = iter([errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EIO])

    def fails(*_: object) -> None:
        number = next(numbers)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("pipelines.store.pulse.store_time", fails)
    assert [pulse.is_silent(store, "run-1") for _ in range(3)] == [False] * 3
    with pytest.raises(OSError, match="Input/output"):
        pulse.is_silent(store, "run-1")
    alive.release()


def test_credentials_lost_in_the_middle_are_named(faults: Faults, s3_store: str) -> None:
    """The words say which to renew; nothing is published, and later it goes on."""
    ledger = Ledger.open(s3_store)
    first = task(ledger, Refused(name="first"))
    with pytest.raises(RetryableError, match=r"refuses our credentials: .*renew them") as caught:
        execute(first)
    assert "token has expired" in str(caught.value)
    faults.refuses = frozenset()
    assert first.record.receipt("a") is None
    assert execute(task(ledger, FakeStage(name="first"))) is not None


def test_a_store_that_ignores_conditions_is_refused(faults: Faults, s3_store: str) -> None:
    """Two drivers would work on one stage; a store once found good is not asked again."""
    faults.ignores_conditions = True
    with pytest.raises(UserError, match="ignores conditional writes: of two creates"):
        Ledger.open(s3_store)
    assert not (location(s3_store) / "ediffi-store.json").exists()
    faults.ignores_conditions = False
    Ledger.open(s3_store)
    faults.ignores_conditions = True
    assert Ledger.open(s3_store).mark() == {"format": 2, "exclusive_create": True}


def test_a_store_that_vanished_is_named(tmp_path: Path) -> None:
    """As when a mount is lost while a unit works."""
    ledger = Ledger.open(tmp_path / "store")

    class Vanishes(FakeStage):
        def run(self, unit: Unit, workspace: Workspace) -> Outcome:
            (tmp_path / "store").rename(tmp_path / "away")
            workspace.report({"images": 1})
            raise AssertionError("not reached")

    with pytest.raises(RetryableError, match=f"{ledger.store}: it was there and is gone"):
        execute(task(ledger, Vanishes(name="first")))


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "no list", "/elsewhere/list.txt"),
        PermissionError(errno.EACCES, "no", "/elsewhere/list.txt"),
        ValueError("wrong input"),
        OSError(errno.ENAMETOOLONG, "too long"),
    ],
)
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    """A missing input is no outage."""
    assert why_it_failed(error, tmp_path) is None
    with pytest.raises(type(error)) as caught, as_retryable(tmp_path, "a test"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EDQUOT, "quota is used up"),
        (errno.EROFS, "read-only"),
        (errno.ESTALE, "mount is stale"),
        (errno.EIO, "disk or its server failed"),
    ],
)
def test_what_a_file_system_says_is_explained(number: int, words: str, tmp_path: Path) -> None:
    """With the next step; the error itself stays as the cause."""
    error = OSError(number, os.strerror(number))
    told = pytest.raises(RetryableError, match=f"a test: .*{words}.*same command")
    with told as caught, as_retryable(tmp_path, "a test"):
        raise error
    assert caught.value.__cause__ is error
