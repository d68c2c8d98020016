"""Kernels and filtering: against closed forms and direct sums."""

import math

import numpy as np
import pytest
import torch

from ediffi.blur import bessel_j1, blur_kernel, convolve, sinc_kernel


def test_bessel_function_agrees_with_torch() -> None:
    """J1 by its integral is torch's, to the precision of torch's, over all that kernels ask for."""
    x = np.linspace(0, 45, 500)
    expected = torch.special.bessel_j1(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(bessel_j1(x), expected, atol=1e-6)


@pytest.mark.parametrize("radius", [1, 3, 10])
def test_kernels_sum_to_one_and_are_their_own_half_turn(radius: int) -> None:
    """No kernel makes a picture brighter, or moves it."""
    for kernel in (
        blur_kernel((1.3, 0.4), 0.7, radius),
        blur_kernel((1.3, 0.4), 0.7, radius, beta=0.6),
        blur_kernel((1.3, 0.4), 0.7, radius, beta=1.5, plateau=True),
        sinc_kernel(1.2, radius),
    ):
        assert kernel.shape == (2 * radius + 1, 2 * radius + 1)
        assert kernel.sum() == pytest.approx(1)
        np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-7)


def test_gaussian_kernel_has_its_standard_deviations() -> None:
    """Second moments of a wide kernel are the squares of the standard deviations, turned."""
    kernel = blur_kernel((2.0, 1.0), math.pi / 6, 12).astype(np.float64)
    y, x = np.mgrid[-12:13, -12:13]
    found = [(kernel * x * x).sum(), (kernel * y * y).sum(), (kernel * x * y).sum()]
    cos, sin = math.cos(math.pi / 6), math.sin(math.pi / 6)
    expected = [4 * cos**2 + sin**2, 4 * sin**2 + cos**2, 3 * cos * sin]
    np.testing.assert_allclose(found, expected, rtol=0.01)


def test_sinc_filter_passes_low_and_stops_high_frequencies() -> None:
    """Waves below the cut-off go through, those above are gone."""
    columns = np.arange(120)
    for frequency, gain in ((0.5, 1.0), (2.5, 0.0)):
        wave = np.tile(np.cos(frequency * columns), (1, 41, 1)).astype(np.float32)
        passed = convolve(wave, sinc_kernel(1.5, 20))[0, 20, 40:80]
        assert np.abs(passed - gain * wave[0, 20, 40:80]).max() < 0.1


@pytest.mark.parametrize("radius", [0, 1, 3])
def test_filtering_is_the_direct_sum_with_reflected_borders(radius: int) -> None:
    """The fast way gives what the definition gives; channels do not mix."""
    rng = np.random.default_rng(0)
    picture = rng.random((3, 7, 9), dtype=np.float32)
    kernel = blur_kernel((1.5, 0.8), 0.4, radius)
    border = ((0, 0), (radius, radius), (radius, radius))
    padded = np.pad(picture, border, mode="reflect")
    expected = np.zeros_like(picture)
    for i in range(2 * radius + 1):
        for j in range(2 * radius + 1):
            expected += kernel[i, j] * padded[:, i : i + 7, j : j + 9]
    np.testing.assert_allclose(convolve(picture, kernel), expected, atol=1e-6)
