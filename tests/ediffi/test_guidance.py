"""Tests of ediffi.guidance: the formula, the null branch and the number of calls."""

import pytest
import torch
from torch import Tensor

from ediffi.conditioning import Conditioning, Stream
from ediffi.guidance import guided


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
