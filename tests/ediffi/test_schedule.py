"""Tests of ediffi.schedule: the grid's ends, its spacing and what it refuses."""

import math

import pytest
import torch

from ediffi.schedule import sigma_schedule


def test_schedule_is_even_in_the_root_of_sigma_and_ends_at_zero():
    """The grid is EDM's equation 5: exact ends, equal steps in sigma^(1/rho), then zero."""
    sigmas = sigma_schedule(18)
    assert (sigmas[0].item(), sigmas[-2].item(), sigmas[-1].item()) == (80.0, 0.002, 0.0)
    assert sigmas.dtype == torch.float64
    steps = (sigmas[:-1] ** (1 / 7)).diff()
    torch.testing.assert_close(steps, steps.mean().expand(17))


@pytest.mark.parametrize("rho", [1.0, 3.0, 6.0, 7.0])
@pytest.mark.parametrize("num_steps", [1, 2, 40])
def test_schedule_has_its_length_and_always_decreases(num_steps, rho):
    """One value per step and the final zero, strictly decreasing; one step jumps to zero."""
    sigmas = sigma_schedule(num_steps, rho=rho, sigma_max=40.0)
    assert len(sigmas) == num_steps + 1
    assert (sigmas.diff() < 0).all()
    assert sigmas[0] == 40.0


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 5, "sigma_min": 0.0}, "sigma_min"),
        ({"num_steps": 5, "sigma_min": 2.0, "sigma_max": 1.0}, "sigma_max"),
        ({"num_steps": 5, "sigma_max": math.inf}, "sigma_max"),
        ({"num_steps": 5, "rho": 0.0}, "rho"),
    ],
)
def test_schedule_names_the_argument_it_refuses(arguments, field):
    """The error says which argument is out of range."""
    with pytest.raises(ValueError, match=field):
        sigma_schedule(**arguments)


def test_the_papers_grid_is_a_schedule_of_one_more_level():
    """sigma_i = (smax^(1/p) + i/N (smin^(1/p) - smax^(1/p)))^p for i = 0..N, and then zero."""
    high, low, num_steps = 80 ** (1 / 6), 0.002 ** (1 / 6), 25
    expected = [(high + i / num_steps * (low - high)) ** 6 for i in range(num_steps + 1)]
    assert sigma_schedule(26, rho=6.0).tolist() == pytest.approx([*expected, 0.0])
