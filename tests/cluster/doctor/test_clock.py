"""Tests of cluster.doctor.clock: how far apart two clocks may be."""

import pytest

from cluster.doctor.clock import check_clock, seconds_of_date


@pytest.mark.parametrize(
    ("theirs", "found"),
    [
        (100.5, "agrees with ours"),  # between before and after
        (99.5, "agrees with ours"),  # it tells whole seconds
        (98.0, "1.0 s behind ours"),
        (103.0, "2.0 s ahead of ours"),
    ],
)
def test_small_differences_are_told_and_borne(theirs: float, found: str) -> None:
    """What the question itself took, and what whole seconds leave out, is no skew."""
    finding = check_clock("a clock", theirs, 100.0, 101.0, resolution_s=1.0)
    assert finding.ok
    assert finding.found == found


def test_a_clock_that_is_off_is_refused() -> None:
    """With the way to set it."""
    finding = check_clock("a clock", 90.0, 100.0, 101.0)
    assert not finding.ok
    assert finding.found == "10.0 s behind ours"
    assert "time server" in finding.remedy


def test_dates_of_http_are_seconds() -> None:
    """As servers and buckets write them."""
    assert seconds_of_date("Thu, 01 Jan 1970 00:01:00 GMT") == 60.0
    with pytest.raises(ValueError):
        seconds_of_date("yesterday")
