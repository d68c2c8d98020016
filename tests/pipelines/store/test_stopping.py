"""Tests of store.stopping: signals as a wish to end, and the mark that tells the workers."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.errors import RetryableError
from pipelines.store import stopping as module
from pipelines.store.ledger import Ledger
from pipelines.store.location import Location, location
from pipelines.store.stopping import Interruption, StopListener, StopMark, listen_for_sigterm


@pytest.fixture(params=["directory", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """An empty store."""
    if request.param == "directory":
        return location(tmp_path / "store")
    return location(request.getfixturevalue("s3_store"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, as the module sees it."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def handlers() -> Iterator[None]:
    """Whatever the test does to signals is undone, and no SIGTERM has been seen after it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    module._is_terminated.clear()


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGTERM, RetryableError), (signal.SIGINT, KeyboardInterrupt)]
)
def test_the_first_signal_is_a_wish_and_the_second_an_order(
    number: signal.Signals, kind: type[BaseException]
) -> None:
    """The first only leaves word what to raise; then the old handlers are back."""
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert interruption.error is None
        os.kill(os.getpid(), number)
        assert isinstance(interruption.error, kind)
        with pytest.raises(kind):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


@pytest.mark.usefixtures("handlers")
def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """A run under nohup, or in the background of a script, does not end by another's Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.error is None
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_the_mark_reaches_the_workers_of_its_run(store: Location, clock: list[float]) -> None:
    """And no other run's; it is no run record, and once removed it stops nobody."""
    mark = StopMark(store, "run-1")
    ours, others = (StopListener.of(store, run_id, rank=0) for run_id in ("run-1", "run-2"))
    mark.put()
    assert ours()
    assert not others()
    assert Ledger(store).runs() == []
    mark.remove()
    mark.remove()
    assert not StopListener.of(store, "run-1", rank=0)()


def test_a_look_costs_little(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked after every batch, it looks once a second, and on a gang's other ranks never."""
    looks: list[int] = []
    monkeypatch.setattr(StopMark, "is_there", lambda self: bool(looks.append(1)))
    listener = StopListener.of(tmp_path, "run-1", rank=0)
    for _ in range(100):
        assert not listener()
    assert len(looks) == 1
    clock[0] += module.LOOK_S
    listener()
    assert len(looks) == 2
    assert not StopListener.of(tmp_path, "run-1", rank=1)()
    assert not StopListener.of(tmp_path, "", rank=0)()
    assert len(looks) == 2


def test_a_look_that_fails_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bucket that does not answer for a moment must not cost a training run; it is said."""

    def fails(self: StopMark) -> bool:
        raise OSError("no route")

    monkeypatch.setattr(StopMark, "is_there", fails)
    assert not StopListener.of(tmp_path, "run-1", rank=0)()
    assert "could not look whether to stop: no route" in caplog.text


@pytest.mark.usefixtures("handlers")
def test_a_worker_that_is_sent_sigterm_is_asked_to_stop(tmp_path: Path) -> None:
    """On every rank: the process listens in its main thread, whichever thread trains."""
    listeners = [StopListener.of(tmp_path, "run-1", rank=rank) for rank in (0, 1)]
    listen_for_sigterm()
    assert not any(listener() for listener in listeners)
    os.kill(os.getpid(), signal.SIGTERM)
    assert all(listener() for listener in listeners)


def test_the_nodes_notice_is_a_wish_to_end(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the file is there the driver ends as by SIGTERM, and says which file it was."""
    notice = tmp_path / "notice"
    monkeypatch.setenv("EDIFFI_PREEMPTION_FILE", str(notice))
    interruption = Interruption()
    assert interruption.look() is None
    notice.touch()
    assert interruption.look() is None  # it has looked just now
    clock[0] += module.LOOK_S
    error = interruption.look()
    assert isinstance(error, RetryableError)
    assert str(notice) in str(error)
    notice.unlink()
    assert interruption.look() is error


def test_workers_hear_the_notice_of_their_own_node(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every rank, for a gang may stand on several nodes; without the variable nobody looks."""
    listener = StopListener.of(tmp_path, "run-1", rank=1)
    assert not listener()
    notice = tmp_path / "notice"
    notice.touch()
    clock[0] += module.LOOK_S
    assert not listener()
    monkeypatch.setenv("EDIFFI_PREEMPTION_FILE", str(notice))
    clock[0] += module.LOOK_S
    assert listener()
