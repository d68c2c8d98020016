"""Tests of pipelines.driver.backoff: how long a unit waits before it is tried again."""

import pytest

from pipelines.driver.backoff import CAP_S, JITTER_FRACTION, delay_s


def test_each_failure_doubles_the_wait_up_to_a_cap() -> None:
    """What lies above the doubling is jitter, at most a quarter."""
    for num_failures, whole in ((1, 2.0), (2, 4.0), (3, 8.0), (40, CAP_S), (10_000, CAP_S)):
        found = delay_s(2.0, num_failures, "train-00000")
        assert whole <= found <= whole * (1 + JITTER_FRACTION)


def test_units_that_failed_together_come_back_apart() -> None:
    """The same unit waits the same every time, others otherwise; nothing waits if nothing shall."""
    delays = [delay_s(1.0, 1, f"train-{number:05}") for number in range(20)]
    assert delays == [delay_s(1.0, 1, f"train-{number:05}") for number in range(20)]
    assert len(set(delays)) == 20
    assert delay_s(0.0, 5, "a") == pytest.approx(0.0)
