"""Tests of ediffi.thresholding: the closed form, per picture, and what it leaves alone."""

import math

import pytest
import torch
from torch import Tensor

from ediffi.conditioning import Conditioning
from ediffi.thresholding import dynamically_thresholded


def identity(x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
    """A denoiser whose estimate is its input."""
    return x_BCHW


def thresholded(x_BCHW: Tensor, quantile: float) -> Tensor:
    """The estimate x, thresholded."""
    num_pictures = len(x_BCHW)
    denoiser = dynamically_thresholded(identity, quantile)
    return denoiser(x_BCHW, torch.ones(num_pictures), Conditioning({}, num_pictures))


def test_an_estimate_out_of_range_is_clipped_at_its_quantile_and_divided_by_it():
    """Of 1000 magnitudes 0.004 ... 4.0, the 995th is the threshold; signs stay."""
    signs = torch.tensor([1.0, -1.0]).repeat(500)
    magnitudes = torch.arange(1, 1001) * 0.004
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    x_BCHW = (signs * magnitudes)[shuffled].view(1, 10, 10, 10)
    found = thresholded(x_BCHW, 0.995).flatten()
    s = 995 * 0.004
    expected = (signs * magnitudes.clamp(max=s) / s)[shuffled]
    torch.testing.assert_close(found, expected)
    assert (found.abs() == 1).sum() == 6
    torch.testing.assert_close(thresholded(x_BCHW, 1.0), x_BCHW / 4.0)


def test_an_estimate_in_range_is_left_alone_and_stray_values_are_clipped():
    """s is never below 1: contrast is not stretched."""
    x_BCHW = torch.linspace(-0.5, 0.5, 300).view(1, 3, 10, 10)
    assert torch.equal(thresholded(x_BCHW, 0.9), x_BCHW)
    x_BCHW[0, 0, 0, 0] = -3.0
    assert thresholded(x_BCHW, 0.9)[0, 0, 0, 0] == -1.0
    assert torch.equal(thresholded(x_BCHW, 0.9)[:, 1:], x_BCHW[:, 1:])


def test_each_picture_has_its_own_threshold():
    """A saturated neighbour changes nothing."""
    pictures = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures *= torch.tensor([0.1, 1.0, 3.0, 30.0])[:, None, None, None]
    together = thresholded(pictures, 0.99)
    for index in range(4):
        assert torch.equal(together[index], thresholded(pictures[index : index + 1], 0.99)[0])
    assert together.abs().max() == 1


@pytest.mark.parametrize("quantile", [0.0, -0.5, 1.01, math.nan])
def test_an_impossible_quantile_is_refused(quantile):
    """It lies in (0, 1]."""
    with pytest.raises(ValueError, match="quantile"):
        dynamically_thresholded(identity, quantile)
