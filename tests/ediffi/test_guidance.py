"""Tests of ediffi.guidance: the formula, the null branch, interval, rescaling, number of calls."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ediffi.conditioning import Conditioning, Stream
from ediffi.guidance import guided
from ediffi.noise import NoiseInterval


class PooledDenoiser:
    """Answers x times the sum of the pooled vector plus one, so that conditioning matters."""

    def __init__(self) -> None:
        self.batch_sizes: list[int] = []

    def __call__(self, x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        self.batch_sizes.append(len(x_BCHW))
        assert len(x_BCHW) == len(sigma_B) == conditioning.batch_size
        pooled_BD = conditioning.streams["clip_text"].pooled_BD
        assert pooled_BD is not None
        factor_B = 1 + pooled_BD.sum(dim=1) * sigma_B
        return factor_B[:, None, None, None] * x_BCHW


X = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([0.1, 1.0, 10.0])
CONDITIONING = Conditioning({"clip_text": Stream(pooled_BD=torch.arange(6.0).view(3, 2))}, 3)


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 7.5])
def test_guidance_extrapolates_from_null_to_conditional(scale):
    """The result is D_null + scale (D_cond - D_null), from one call on twice the batch."""
    denoiser = PooledDenoiser()
    conditional = denoiser(X, SIGMA, CONDITIONING)
    null = denoiser(X, SIGMA, CONDITIONING.null())
    denoiser.batch_sizes.clear()
    found = guided(denoiser, scale)(X, SIGMA, CONDITIONING)
    torch.testing.assert_close(found, null + scale * (conditional - null))
    torch.testing.assert_close(null, X)
    assert denoiser.batch_sizes == [6]


def test_scale_one_makes_only_the_conditional_call():
    """Without guidance nothing is computed twice and the answer is the denoiser's, bit for bit."""
    denoiser = PooledDenoiser()
    found = guided(denoiser, 1.0)(X, SIGMA, CONDITIONING)
    assert denoiser.batch_sizes == [3]
    assert torch.equal(found, PooledDenoiser()(X, SIGMA, CONDITIONING))


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_guidance_refuses_an_impossible_scale(scale):
    """The scale must be a finite, non-negative number."""
    with pytest.raises(ValueError, match="guidance scale"):
        guided(PooledDenoiser(), scale)


@pytest.mark.parametrize(
    ("sigma", "batch_size"), [(0.299, 3), (0.3, 6), (2.0, 6), (4.999, 6), (5.0, 3), (80.0, 3)]
)
def test_guidance_acts_inside_its_interval_alone(sigma, batch_size):
    """Half-open: guided as ever from 0.3 on, from 5 on the conditional estimate bit for bit."""
    denoiser, sigma_B = PooledDenoiser(), torch.full((3,), sigma, dtype=torch.float64)
    found = guided(denoiser, 2.5, interval=NoiseInterval(0.3, 5.0))(X, sigma_B, CONDITIONING)
    assert denoiser.batch_sizes == [batch_size]
    scale = 2.5 if batch_size == 6 else 1.0
    assert torch.equal(found, guided(PooledDenoiser(), scale)(X, sigma_B, CONDITIONING))


def test_pictures_of_one_call_are_guided_each_by_its_own_sigma():
    """A call across the interval's edge gives every picture what it would get alone."""
    part = guided(PooledDenoiser(), 3.0, interval=NoiseInterval(0.5, 5.0))
    found = part(X, SIGMA, CONDITIONING)
    for index, scale in enumerate((1.0, 3.0, 1.0)):
        own = torch.tensor([index])
        expected = guided(PooledDenoiser(), scale)(X[own], SIGMA[own], CONDITIONING.select(own))
        torch.testing.assert_close(found[own], expected)


class ShiftedDenoiser(PooledDenoiser):
    """The conditional estimate is another picture than the null one, not only a multiple."""

    def __call__(self, x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        pooled_BD = conditioning.streams["clip_text"].pooled_BD
        return super().__call__(x_BCHW, sigma_B, conditioning) + pooled_BD[:, :, None, None]


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescaling_brings_back_the_deviation_of_the_conditional_estimate(rescale):
    """D_guided (rescale std_cond / std_guided + 1 - rescale), each picture by its own."""
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    conditional = ShiftedDenoiser()(x, SIGMA, CONDITIONING).numpy()
    plain = guided(ShiftedDenoiser(), 4.0)(x, SIGMA, CONDITIONING).numpy()
    found = guided(ShiftedDenoiser(), 4.0, rescale=rescale)(x, SIGMA, CONDITIONING).numpy()
    for found_CHW, plain_CHW, conditional_CHW in zip(found, plain, conditional):
        ratio = np.std(conditional_CHW) / np.std(plain_CHW)
        assert ratio < 0.9
        expected = plain_CHW * (rescale * ratio + 1 - rescale)
        np.testing.assert_allclose(found_CHW, expected, rtol=1e-5)
    if rescale == 1:
        deviations = found.std(axis=(1, 2, 3))
        np.testing.assert_allclose(deviations, conditional.std(axis=(1, 2, 3)), rtol=1e-5)


def test_rescaling_by_nothing_and_of_a_flat_picture_changes_nothing():
    """Rescale 0 is plain guidance bit for bit; a picture of one value stays as it is."""
    plain = guided(PooledDenoiser(), 4.0)
    none = guided(PooledDenoiser(), 4.0, rescale=0.0)
    assert torch.equal(none(X, SIGMA, CONDITIONING), plain(X, SIGMA, CONDITIONING))
    flat = torch.full_like(X, 0.25)
    rescaled = guided(PooledDenoiser(), 4.0, rescale=0.7)
    assert torch.equal(rescaled(flat, SIGMA, CONDITIONING), plain(flat, SIGMA, CONDITIONING))


@pytest.mark.parametrize("rescale", [-0.1, 1.1, math.nan])
def test_guidance_refuses_an_impossible_rescale(rescale):
    """It is a share."""
    with pytest.raises(ValueError, match="guidance rescale"):
        guided(PooledDenoiser(), 2.0, rescale=rescale)
