"""Tests of ediffi.train.meter: means by noise level, clocks, utilisation and memory."""

import math
import time

import pytest
import torch

from ediffi.train import meter as meter_module
from ediffi.train.engine import Worker, join_process_group
from ediffi.train.flops import PeakFlops
from ediffi.train.meter import Meter


@pytest.fixture
def worker() -> Worker:
    """This process, alone in its group."""
    return join_process_group()


class Clock:
    """A clock that tests move by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The meter's clock, standing still."""
    clock = Clock()
    monkeypatch.setattr(meter_module, "time", clock)
    return clock


def test_losses_are_means_over_images_by_octile(worker):
    """Batches of any size weigh by their images; octiles nobody drew are left out."""
    meter = Meter(worker)
    meter.add(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.0, 0.124, 0.99]).double())
    meter.add(torch.tensor([9.0]), torch.tensor([0.125]).double())
    row = meter.read()
    assert row["loss"] == 4.5
    assert {key: row[key] for key in row if "bin" in key} == {
        "loss/sigma_bin_00": 1.5,
        "loss/sigma_bin_01": 9.0,
        "loss/sigma_bin_07": 6.0,
    }
    meter.add(torch.tensor([3.0]), torch.tensor([1.0]).double())
    again = meter.read()
    assert again["loss"] == again["loss/sigma_bin_07"] == 3.0


def test_losses_that_are_not_finite_spoil_no_mean(worker, clock):
    """They count as images trained on; with nothing else to average there is no mean."""
    meter = Meter(worker)
    meter.add(torch.tensor([1.0, math.nan, math.inf]), torch.tensor([0.1, 0.1, 0.9]).double())
    clock.now_s += 1
    row = meter.read()
    assert row["loss"] == row["loss/sigma_bin_00"] == 1.0
    assert "loss/sigma_bin_07" not in row
    assert row["images_per_s"] == 3
    meter.add(torch.tensor([math.nan]), torch.tensor([0.1]).double())
    clock.now_s += 1
    assert "loss" not in meter.read()


def test_speeds_leave_out_pauses_but_not_waiting(worker, clock):
    """Ten seconds, of which two waiting for data, and five more in between for other things."""
    meter = Meter(worker, PeakFlops(flops_per_s=100.0, source="a test"))
    for _ in range(4):
        clock.now_s += 2
        with meter.waiting():
            clock.now_s += 0.5
        meter.add(torch.ones(5), torch.zeros(5).double())
        meter.count_flops(50.0)
        meter.count_step()
    with meter.paused():
        clock.now_s += 5
    row = meter.read()
    assert row["images_per_s"] == 2.0
    assert row["step_s"] == 2.5
    assert row["data_wait_fraction"] == 0.2
    assert row["mfu"] == pytest.approx(200 / (100 * 10))


def test_restarted_clock_forgets_the_time_but_not_the_losses(worker, clock):
    """As after a checkpoint, which is no part of the training's speed."""
    meter = Meter(worker)
    meter.add(torch.ones(4), torch.zeros(4).double())
    clock.now_s += 100
    meter.restart_clock()
    clock.now_s += 2
    assert meter.read()["images_per_s"] == 2.0


def test_sums_in_a_checkpoint_are_gone_on_with(worker):
    """A row that a checkpoint cuts in two is the undisturbed run's, bit by bit."""
    whole, before, after = Meter(worker), Meter(worker), Meter(worker)
    generator = torch.Generator().manual_seed(0)
    losses = [torch.rand(7, generator=generator) for _ in range(4)]
    quantiles = [torch.rand(7, generator=generator).double() for _ in range(4)]
    for number, (loss_B, quantile_B) in enumerate(zip(losses, quantiles)):
        whole.add(loss_B, quantile_B)
        (before if number < 2 else after).add(loss_B, quantile_B)
        if number == 1:
            after.resume(before.sums())
    expected, found = whole.read(), after.read()
    assert {k: v for k, v in found.items() if "loss" in k} == {
        k: v for k, v in expected.items() if "loss" in k
    }


def test_sums_of_more_ranks_are_added_up(worker):
    """On another number of ranks the first one takes all over."""
    meter = Meter(worker)
    one_rank = tuple(float(i) for i in range(16))
    meter.resume([one_rank, one_rank])
    assert meter.sums() == (tuple(2 * value for value in one_rank),)


def test_without_a_peak_there_is_no_utilisation(worker, clock):
    """Rather no number than a wrong one."""
    meter = Meter(worker)
    clock.now_s += 1
    assert "mfu" not in meter.read()


def test_memory_is_that_of_the_process(worker):
    """On a CPU the largest resident set: more than torch itself, and never falling."""
    meter = Meter(worker)
    before_gib = meter.read()["memory_gib"]
    ballast = torch.ones(64, 2**20)  # 256 MiB, touched
    after_gib = meter.read()["memory_gib"]
    assert 0.05 < before_gib <= after_gib
    del ballast
    assert meter.read()["memory_gib"] >= after_gib


def test_real_clock_is_used(worker):
    """Sleeping inside `waiting` shows as data wait."""
    meter = Meter(worker)
    with meter.waiting():
        time.sleep(0.02)
    assert 0 < meter.read()["data_wait_fraction"] <= 1
