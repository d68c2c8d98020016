"""Tests of ediffi.schedule and ediffi.samplers: the grid, order of convergence, call counts."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from ediffi.conditioning import Conditioning
from ediffi.samplers import SAMPLERS, SamplerStep, initial_noise
from ediffi.schedule import sigma_schedule

SIGMA_DATA = 0.5
NAMES = sorted(SAMPLERS)


class IdealDenoiser:
    """The exact denoiser of N(0, sigma_data^2) pictures; remembers the sigma of every call."""

    def __init__(self) -> None:
        self.sigmas: list[float] = []
        self.conditionings: list[Conditioning] = []

    def __call__(self, x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        assert x_BCHW.dtype == sigma_B.dtype == torch.float32
        assert sigma_B.shape == x_BCHW.shape[:1]
        self.sigmas.append(sigma_B[0].item())
        self.conditionings.append(conditioning)
        sigma_B111 = sigma_B[:, None, None, None]
        return SIGMA_DATA**2 / (SIGMA_DATA**2 + sigma_B111**2) * x_BCHW


def exact_scale(sigma_start: float, sigma_end: float) -> float:
    """Factor by which the ODE of N(0, sigma_data^2) shrinks x between two noise levels."""
    return math.sqrt((SIGMA_DATA**2 + sigma_end**2) / (SIGMA_DATA**2 + sigma_start**2))


def convergence(name: str, schedules: list[Tensor]) -> tuple[float, float]:
    """Order of a log-log fit of the relative error over num steps, and the last error."""
    errors = []
    for sigmas in schedules:
        start, end = sigmas[0].item(), sigmas[-1].item()
        x_BCHW = torch.full((1, 1, 1, 1), start, dtype=torch.float64)
        found = SAMPLERS[name](IdealDenoiser(), x_BCHW, sigmas, Conditioning({}, 1)).item()
        errors.append(abs(found / (start * exact_scale(start, end)) - 1))
    num_steps = [len(sigmas) for sigmas in schedules]
    slope, _ = np.polyfit(np.log(num_steps), np.log(errors), 1)
    return -slope, errors[-1]


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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("sigma_max", "sigma_min"), [(80.0, 0.002), (10.0, 0.02)])
def test_samplers_converge_with_second_order(name, sigma_max, sigma_min):
    """The error falls as num_steps^-2; a Heun correction taken at the near end gives -1."""
    schedules = [
        sigma_schedule(num_steps, sigma_min=sigma_min, sigma_max=sigma_max)[:-1]
        for num_steps in (32, 64, 128, 256)
    ]
    order, last_error = convergence(name, schedules)
    assert 1.9 < order < 2.25
    assert last_error < 3e-4


def test_dpm_solver_extrapolates_to_the_middle_of_uneven_steps():
    """For D linear in ln(sigma) every step but the first uses D at the step's own middle.

    The order of convergence cannot tell: extrapolating by the wrong ratio of step lengths leaves
    errors that cancel from step to step.
    """

    def linear(x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        return 2 + 3 * sigma_B.log()[:, None, None, None]

    steps: list[SamplerStep] = []
    sigmas = torch.tensor([10.0, 7.0, 1.0, 0.8, 0.1, 0.09]).double()
    SAMPLERS["dpm++2m"](
        linear, torch.full((1, 1, 1, 1), 10.0), sigmas, Conditioning({}, 1), steps.append
    )
    for before, step, sigma_next in zip(steps, steps[1:], sigmas[2:].tolist()):
        ratio = sigma_next / step.sigma
        middle = 2 + 3 * math.log(math.sqrt(step.sigma * sigma_next))
        expected = ratio * before.x_BCHW.item() + (1 - ratio) * middle
        assert step.x_BCHW.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_samplers_end_with_the_standard_deviation_of_the_data(name):
    """From pure noise at sigma_max to zero, Gaussian pictures come out with sigma_data."""
    x_BCHW = initial_noise(range(64), (3, 8, 8), 80.0)
    pictures = SAMPLERS[name](IdealDenoiser(), x_BCHW, sigma_schedule(64), Conditioning({}, 64))
    assert pictures.std().item() == pytest.approx(SIGMA_DATA, rel=0.02)
    assert (pictures.dtype, pictures.shape) == (torch.float32, x_BCHW.shape)


@pytest.mark.parametrize("name", NAMES)
def test_one_step_to_zero_is_the_denoised_picture(name):
    """A step that ends at zero is the clean image estimate itself, to rounding."""
    x_BCHW = initial_noise([0, 1], (1, 4, 4), 2.0)
    conditioning, denoiser = Conditioning({}, 2), IdealDenoiser()
    sampled = SAMPLERS[name](denoiser, x_BCHW, sigma_schedule(1, sigma_max=2.0), conditioning)
    torch.testing.assert_close(sampled, denoiser(x_BCHW, torch.full((2,), 2.0), conditioning))


def test_heun_calls_both_ends_of_each_step_with_their_own_sigma():
    """2N - 1 calls: the start and the end of each step, but not sigma = 0."""
    denoiser, sigmas = IdealDenoiser(), sigma_schedule(4)
    SAMPLERS["heun"](denoiser, initial_noise([0], (1, 2, 2), 80.0), sigmas, Conditioning({}, 1))
    ends = [sigma for step in pairwise(sigmas.float().tolist()) for sigma in step]
    assert denoiser.sigmas == ends[:-1]


def test_dpm_solver_calls_once_per_step():
    """N calls, at the start of each step; the conditioning is handed on untouched."""
    denoiser, sigmas, conditioning = IdealDenoiser(), sigma_schedule(4), Conditioning({}, 1)
    SAMPLERS["dpm++2m"](denoiser, initial_noise([0], (1, 2, 2), 80.0), sigmas, conditioning)
    assert denoiser.sigmas == sigmas[:-1].float().tolist()
    assert all(seen is conditioning for seen in denoiser.conditionings)


@pytest.mark.parametrize("name", NAMES)
def test_callback_sees_every_step(name):
    """Each step reports its index, its sigma, the state after it and the clean estimate."""
    steps: list[SamplerStep] = []
    sigmas = sigma_schedule(3)
    x_BCHW = initial_noise([5], (1, 2, 2), 80.0)
    result = SAMPLERS[name](IdealDenoiser(), x_BCHW, sigmas, Conditioning({}, 1), steps.append)
    assert [(step.index, step.num_steps) for step in steps] == [(0, 3), (1, 3), (2, 3)]
    assert [step.sigma for step in steps] == sigmas[:-1].tolist()
    assert steps[0].x_BCHW.dtype == torch.float64
    torch.testing.assert_close(steps[-1].x_BCHW.float(), result)
    torch.testing.assert_close(steps[-1].denoised_BCHW.float(), result)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 2.0], [1.0, 1.0], [1.0, -0.5], [[2.0, 1.0]]])
def test_samplers_refuse_what_is_no_schedule(name, sigmas):
    """Noise levels must strictly decrease and stay non-negative."""
    with pytest.raises(ValueError, match="strictly decreasing"):
        SAMPLERS[name](
            IdealDenoiser(), torch.zeros(1, 1, 1, 1), torch.tensor(sigmas), Conditioning({}, 1)
        )


@pytest.mark.parametrize("name", NAMES)
def test_samplers_keep_no_gradients(name):
    """Sampling builds no autograd graph."""
    x_BCHW = initial_noise([0], (1, 2, 2), 80.0).requires_grad_()
    sampled = SAMPLERS[name](IdealDenoiser(), x_BCHW, sigma_schedule(2), Conditioning({}, 1))
    assert not sampled.requires_grad


def test_initial_noise_of_a_seed_does_not_depend_on_its_batch():
    """A picture's noise is a function of its seed alone and scales with sigma_max."""
    shape = (3, 5, 7)
    together = initial_noise([7, 0, 123456789012], shape, 80.0)
    for index, seed in enumerate([7, 0, 123456789012]):
        assert torch.equal(together[index], initial_noise([seed], shape, 80.0)[0])
    torch.testing.assert_close(together, 80 * initial_noise([7, 0, 123456789012], shape, 1.0))
    assert not torch.equal(together[0], together[1])
    assert (together.dtype, together.shape) == (torch.float32, (3, *shape))


def test_initial_noise_is_standard_normal_and_refuses_negative_seeds():
    """Mean 0 and deviation sigma_max; a negative seed is named."""
    noise = initial_noise(range(32), (3, 16, 16), 1.0)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.02)
    assert noise.std().item() == pytest.approx(1.0, abs=0.02)
    with pytest.raises(ValueError, match="-3"):
        initial_noise([1, -3], (1, 2, 2), 1.0)
