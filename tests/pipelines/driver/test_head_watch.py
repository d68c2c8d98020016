"""Tests of the look at the cluster's head."""

import socket
import time

import pytest

from pipelines.driver import head_watch
from pipelines.driver.head_watch import HeadWatch
from pipelines.errors import RetryableError


def test_a_head_may_be_away_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for, a return sets the clock back, and a long silence ends the run."""
    monkeypatch.setattr(head_watch, "SILENT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        watch = HeadWatch(address)
        assert watch.answers()
    assert not watch.answers()
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        assert watch.answers()
    assert not watch.answers()
    time.sleep(0.5)
    with pytest.raises(
        RetryableError, match=rf"{address} has not answered for 0\.5 s .*run the same"
    ):
        watch.answers()


@pytest.mark.usefixtures("ray_cluster")
def test_a_real_head_answers() -> None:
    """The address is the one that this process has joined."""
    assert HeadWatch.of_this_cluster().answers()
