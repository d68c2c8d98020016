"""Tests of ediffi.preconditioning: EDM's identities and the denoiser around a network."""

import pytest
import torch
from torch import Tensor, nn

from ediffi.conditioning import Conditioning
from ediffi.preconditioning import Denoiser, Preconditioning

SIGMA = torch.logspace(-3, 2, 21, dtype=torch.float64)


class Recorder(nn.Module):
    """A network that returns a constant and remembers its input."""

    def __init__(self, value: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.value, self.dtype = value, dtype

    def forward(self, x_BCHW: Tensor, c_noise_B: Tensor, conditioning: Conditioning) -> Tensor:
        self.x_BCHW, self.c_noise_B, self.conditioning = x_BCHW, c_noise_B, conditioning
        return torch.full_like(x_BCHW, self.value, dtype=self.dtype)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_network_input_and_target_have_unit_variance_at_every_sigma(sigma_data):
    """c_in and c_out are what make input c_in x and target (y - c_skip x) / c_out standard."""
    p = Preconditioning(sigma_data=sigma_data)
    variance_in = p.c_in(SIGMA) ** 2 * (sigma_data**2 + SIGMA**2)
    skip = p.c_skip(SIGMA)
    variance_target = ((1 - skip) ** 2 * sigma_data**2 + skip**2 * SIGMA**2) / p.c_out(SIGMA) ** 2
    torch.testing.assert_close(variance_in, torch.ones_like(SIGMA))
    torch.testing.assert_close(variance_target, torch.ones_like(SIGMA))


def test_loss_weight_gives_the_network_unit_weight():
    """lambda is the inverse square of c_out."""
    p = Preconditioning()
    torch.testing.assert_close(p.loss_weight(SIGMA) * p.c_out(SIGMA) ** 2, torch.ones_like(SIGMA))


def test_c_noise_is_a_quarter_of_the_logarithm():
    """The network is told ln(sigma) / 4."""
    torch.testing.assert_close(Preconditioning().c_noise(SIGMA).mul(4).exp(), SIGMA)


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, float("nan"), float("inf")])
def test_sigma_data_must_be_positive(sigma_data):
    """The error names the field."""
    with pytest.raises(ValueError, match="sigma_data"):
        Preconditioning(sigma_data=sigma_data)


def test_denoiser_combines_network_and_skip_per_sample():
    """D = c_skip x + c_out F with each sample's own sigma, and the network sees c_in x."""
    p, network = Preconditioning(), Recorder(2.0)
    x_BCHW, sigma_B = torch.randn(3, 1, 2, 2), torch.tensor([0.01, 0.5, 40.0])
    conditioning = Conditioning({}, 3)
    denoised_BCHW = Denoiser(network, p)(x_BCHW, sigma_B, conditioning)
    for b, sigma in enumerate(sigma_B):
        torch.testing.assert_close(
            denoised_BCHW[b], p.c_skip(sigma) * x_BCHW[b] + p.c_out(sigma) * 2.0
        )
        torch.testing.assert_close(network.x_BCHW[b], p.c_in(sigma) * x_BCHW[b])
    torch.testing.assert_close(network.c_noise_B, sigma_B.log() / 4)
    assert network.conditioning is conditioning


def test_untrained_denoiser_with_zero_network_keeps_a_clean_picture():
    """With F = 0 and little noise the estimate is the input itself."""
    x_BCHW = torch.rand(2, 3, 4, 4)
    denoiser = Denoiser(Recorder(0.0), Preconditioning())
    denoised_BCHW = denoiser(x_BCHW, torch.full((2,), 1e-4), Conditioning({}, 2))
    torch.testing.assert_close(denoised_BCHW, x_BCHW)


def test_denoiser_is_float32_whatever_goes_in_or_comes_from_the_network():
    """Float64 state and a bfloat16 network both meet in float32."""
    network = Recorder(1.0, torch.bfloat16)
    x_BCHW = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    sigma_B = torch.ones(2, dtype=torch.float64)
    denoised_BCHW = Denoiser(network, Preconditioning())(x_BCHW, sigma_B, Conditioning({}, 2))
    assert (network.x_BCHW.dtype, denoised_BCHW.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("shape", [(), (1,), (2, 1)])
def test_denoiser_refuses_sigma_that_is_not_one_per_image(shape):
    """Silent broadcasting of sigma is an error."""
    denoiser = Denoiser(Recorder(0.0), Preconditioning())
    with pytest.raises(ValueError, match="one noise level per image"):
        denoiser(torch.zeros(2, 1, 2, 2), torch.ones(shape), Conditioning({}, 2))


def test_preconditioning_survives_json():
    """The coefficients are read back equal."""
    p = Preconditioning(sigma_data=0.37)
    assert Preconditioning.from_json(p.to_json()) == p
