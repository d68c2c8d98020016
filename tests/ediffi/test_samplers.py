"""Tests of ediffi.samplers: order of convergence, calls, noise of seeds, churn."""

import math
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor

from ediffi.conditioning import Conditioning
from ediffi.samplers import (
    SAMPLERS,
    Churn,
    Sampler,
    SamplerStep,
    churn_noise,
    deis_3kutta,
    heun,
    initial_noise,
)
from ediffi.schedule import sigma_schedule

SIGMA_DATA = 0.5
NAMES = sorted(SAMPLERS)
ORDERS = {"heun": 2, "dpm++2m": 2, "deis": 3}


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


def mixture_denoiser(x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
    """The exact denoiser of values that are -1 or 1, blurred by N(0, sigma_data^2)."""
    variance_B111 = SIGMA_DATA**2 + sigma_B.double()[:, None, None, None] ** 2
    x = x_BCHW.double()
    sign = torch.tanh(x / variance_B111)
    return (x + (sign - x) * (1 - SIGMA_DATA**2 / variance_B111)).float()


def exact_mixture(x: float, sigma_start: float, sigma_end: float) -> float:
    """Where the mixture's ODE brings x: in one dimension it keeps the fraction of values below."""

    def below(value: float, sigma: float) -> float:
        deviation = math.sqrt(SIGMA_DATA**2 + sigma**2)
        return 0.5 * sum(NormalDist(mean, deviation).cdf(value) for mean in (-1, 1))

    wanted, low, high = below(x, sigma_start), -10.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle, sigma_end) < wanted else (low, middle)
    return (low + high) / 2


def euler(denoiser, x_BCHW, sigmas, conditioning, callback=None) -> Tensor:
    """First-order control: what the measurement of order must tell apart."""
    x = x_BCHW
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        denoised = denoiser(x.float(), torch.full((len(x),), sigma), conditioning).double()
        x = x + (sigma_next - sigma) * (x - denoised) / sigma
    return x


def order_of(errors: list[float], schedules: list[Tensor]) -> float:
    """Slope of a log-log fit of the error over the number of steps, positive."""
    slope, _ = np.polyfit(np.log([len(sigmas) - 1 for sigmas in schedules]), np.log(errors), 1)
    return -slope


def gaussian_errors(sampler: Sampler, schedules: list[Tensor]) -> list[float]:
    """Relative error of one value of N(0, sigma_data^2) at the end of each schedule."""
    errors = []
    for sigmas in schedules:
        start, end = sigmas[0].item(), sigmas[-1].item()
        x_BCHW = torch.full((1, 1, 1, 1), start, dtype=torch.float64)
        found = sampler(IdealDenoiser(), x_BCHW, sigmas, Conditioning({}, 1)).item()
        errors.append(abs(found / (start * exact_scale(start, end)) - 1))
    return errors


def grids(
    nums_steps: tuple[int, ...], *, sigma_max: float, sigma_min: float, rho: float = 7.0
) -> list[Tensor]:
    """Schedules that end at sigma_min, where the exact solution is known, and not at zero."""
    return [
        sigma_schedule(num_steps + 1, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)[:-1]
        for num_steps in nums_steps
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("sigma_max", "sigma_min", "rho"), [(80.0, 0.002, 7.0), (80.0, 0.002, 6.0), (10.0, 0.02, 7.0)]
)
def test_samplers_converge_with_their_order(name, sigma_max, sigma_min, rho):
    """On a Gaussian: num_steps^-2, and ^-3 for DEIS. A Heun correction at the near end gives -1."""
    schedules = grids((48, 96, 192), sigma_max=sigma_max, sigma_min=sigma_min, rho=rho)
    errors = gaussian_errors(SAMPLERS[name], schedules)
    assert order_of(errors, schedules) == pytest.approx(ORDERS[name], abs=0.25)
    assert errors[-1] < 10.0 ** -(1.25 * ORDERS[name] + 0.75)


@pytest.mark.parametrize("name", NAMES)
def test_samplers_keep_their_order_where_the_denoiser_is_not_linear(name):
    """On a mixture of two Gaussians, whose ODE in one dimension keeps quantiles."""
    schedules = grids((32, 64, 128), sigma_max=20.0, sigma_min=0.02)
    errors = []
    for sigmas in schedules:
        x_BCHW = torch.full((1, 1, 1, 1), 6.0, dtype=torch.float64)
        found = SAMPLERS[name](mixture_denoiser, x_BCHW, sigmas, Conditioning({}, 1)).item()
        errors.append(abs(found - exact_mixture(6.0, 20.0, 0.02)))
    assert order_of(errors, schedules) == pytest.approx(ORDERS[name], abs=0.35)


def test_the_measurement_of_order_tells_a_first_order_method():
    """Euler's method reads as 1: the tests above could fail."""
    schedules = grids((48, 96, 192), sigma_max=10.0, sigma_min=0.02)
    assert order_of(gaussian_errors(euler, schedules), schedules) == pytest.approx(1.0, abs=0.15)


def test_deis_integrates_a_cubic_slope_exactly_in_one_step():
    """Where the slope is a cubic in sigma, weights 1 : 4 : 1 at start, middle and end are exact."""

    def cubic(x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        sigma = sigma_B.double()[:, None, None, None]
        return x_BCHW - (sigma * (1 + sigma - 2 * sigma**2 + sigma**3)).float()

    sigmas = torch.tensor([3.0, 1.0]).double()
    x_BCHW = torch.full((1, 1, 1, 1), 7.0, dtype=torch.float64)
    found = deis_3kutta(cubic, x_BCHW, sigmas, Conditioning({}, 1)).item()
    integral = -(2 + (9 - 1) / 2 - 2 * (27 - 1) / 3 + (81 - 1) / 4)
    assert found == pytest.approx(7 + integral, rel=1e-5)


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


def test_deis_calls_start_middle_and_end_of_each_step():
    """3N calls and one for the step to zero, each with its own sigma."""
    denoiser, sigmas = IdealDenoiser(), sigma_schedule(3)
    SAMPLERS["deis"](denoiser, initial_noise([0], (1, 2, 2), 80.0), sigmas, Conditioning({}, 1))
    high, middle, low, _ = sigmas.tolist()
    expected = [high, (high + middle) / 2, middle, middle, (middle + low) / 2, low, low]
    assert denoiser.sigmas == torch.tensor(expected).tolist()


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


def test_noise_of_the_base_is_the_stream_of_the_seed_itself():
    """Stage 0 starts from Philox keyed by the seed: pictures of a seed never change."""
    expected = np.random.Generator(np.random.Philox(41)).standard_normal((3, 4, 4), np.float32)
    assert torch.equal(initial_noise([41], (3, 4, 4), 1.0)[0], torch.from_numpy(expected))


def test_noise_differs_by_stage_and_by_step():
    """Start and churn of each stage come from streams of their own, whatever the batch."""
    shape = (3, 4, 4)
    noises = [initial_noise([3, 9], shape, 1.0, stage=stage) for stage in (0, 1, 2)]
    noises += [churn_noise([3, 9], shape, step, stage=stage) for stage in (0, 1) for step in (0, 1)]
    for index, noise in enumerate(noises):
        assert not any(torch.equal(noise[1], other[1]) for other in noises[:index])
    assert torch.equal(
        churn_noise([3, 9], shape, 1, stage=1)[1:], churn_noise([9], shape, 1, stage=1)
    )
    with pytest.raises(ValueError, match="stage"):
        initial_noise([3], shape, 1.0, stage=-1)
    with pytest.raises(ValueError, match="at least one"):
        initial_noise([], shape, 1.0)


def churned(
    amount: float, *, num_steps: int = 48, shape: tuple[int, int, int] = (3, 8, 8), **fields: float
) -> tuple[Tensor, list[float]]:
    """64 pictures by Heun with churn, and the sigmas of all calls."""
    seeds, denoiser = range(64), IdealDenoiser()
    churn = Churn(amount=amount, noise=lambda step: churn_noise(seeds, shape, step), **fields)
    x_BCHW, sigmas = initial_noise(seeds, shape, 80.0), sigma_schedule(num_steps)
    return heun(denoiser, x_BCHW, sigmas, Conditioning({}, 64), churn=churn), denoiser.sigmas


def test_churn_keeps_the_deviation_of_gaussian_pictures():
    """Noise is added and taken away again; with 1.2 of it, too much is left."""
    plain, _ = churned(0.0, num_steps=160)
    pictures, _ = churned(40.0, num_steps=160)
    assert pictures.std().item() == pytest.approx(SIGMA_DATA, rel=0.02)
    correlation = torch.corrcoef(torch.stack([plain.flatten(), pictures.flatten()]))[0, 1]
    assert correlation < 0.5
    excess, _ = churned(40.0, num_steps=160, noise_scale=1.2)
    assert excess.std().item() > 1.1 * SIGMA_DATA


def test_churn_of_nothing_is_heun_bit_for_bit():
    """At 0, and where no step lies in its range."""
    x_BCHW = initial_noise(range(64), (3, 8, 8), 80.0)
    plain = heun(IdealDenoiser(), x_BCHW, sigma_schedule(48), Conditioning({}, 64))
    assert torch.equal(churned(0.0)[0], plain)
    assert torch.equal(churned(20.0, sigma_min=90.0)[0], plain)


def test_churn_raises_sigma_within_its_range_by_at_most_the_root_of_two():
    """gamma = min(S_churn / N, sqrt 2 - 1), from S_min to S_max, both included."""
    levels = sigma_schedule(48)[:-1]
    low, high = levels[30].item(), levels[10].item()
    for amount, factor in ((4.8, 1.1), (1000.0, math.sqrt(2))):
        _, called = churned(amount, shape=(1, 1, 1), sigma_min=low, sigma_max=high)
        inside = (levels >= low) & (levels <= high)
        assert inside.sum() == 21
        expected = torch.where(inside, factor * levels, levels)
        torch.testing.assert_close(torch.tensor(called[::2]), expected.float())
