"""Preconditioning: from a network with unit-variance inputs and targets to a denoiser.

D(x; e, sigma) = c_skip x + c_out F(c_in x; e, c_noise), eDiff-I section 3; coefficients from EDM
(arXiv 2206.00364, table 1). Whatever the noise level, the network's input and its training target
have unit variance when the data have standard deviation sigma_data.

Shape legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from torch import Tensor, nn

from ediffi.conditioning import Conditioning

# Maps (x_BCHW, sigma_B, conditioning) to the clean image estimate, all float32. Base, expert,
# ensemble and guided denoiser alike.
DenoiserFn = Callable[[Tensor, Tensor, Conditioning], Tensor]


@dataclass(frozen=True, kw_only=True)
class Preconditioning:
    """EDM's coefficients as functions of sigma, elementwise over tensors of any shape."""

    sigma_data: float = 0.5  # standard deviation of the images in [-1, 1]

    def __post_init__(self) -> None:
        """Raise ValueError unless sigma_data is positive and finite."""
        if not (math.isfinite(self.sigma_data) and self.sigma_data > 0):
            raise ValueError(
                f"sigma_data must be positive and finite, got {self.sigma_data}: the paper uses 0.5"
            )

    def c_skip(self, sigma: Tensor) -> Tensor:
        """sigma_data^2 / (sigma^2 + sigma_data^2)."""
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def c_out(self, sigma: Tensor) -> Tensor:
        """sigma sigma_data / sqrt(sigma^2 + sigma_data^2)."""
        return sigma * self.sigma_data * self.c_in(sigma)

    def c_in(self, sigma: Tensor) -> Tensor:
        """1 / sqrt(sigma^2 + sigma_data^2)."""
        return (sigma**2 + self.sigma_data**2).rsqrt()

    def c_noise(self, sigma: Tensor) -> Tensor:
        """ln(sigma) / 4, what the network is told of the noise level."""
        return sigma.log() / 4

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """lambda(sigma) = 1 / c_out^2, which gives the loss of F unit weight everywhere."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`; unknown fields raise TypeError."""
        return cls(**record)


class Denoiser(nn.Module):
    """A network with its preconditioning: (x, sigma, conditioning) to the clean image estimate.

    Args:
        network: called as network(x_BCHW, c_noise_B, conditioning), returns F of x's shape.
        preconditioning: the coefficients around it.
    """

    def __init__(self, network: nn.Module, preconditioning: Preconditioning) -> None:
        super().__init__()
        self.network = network
        self.preconditioning = preconditioning

    def forward(self, x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Estimate the clean images; float32 in and out, the network may run under autocast.

        Raises:
            ValueError: `sigma_B` does not hold one positive noise level per image.
        """
        if sigma_B.shape != x_BCHW.shape[:1]:
            raise ValueError(
                f"sigma must have shape ({len(x_BCHW)},), one noise level per image, "
                f"got {tuple(sigma_B.shape)}: expand it to the batch"
            )
        x_BCHW, sigma_B = x_BCHW.float(), sigma_B.float()
        sigma_B111 = sigma_B[:, None, None, None]
        coefficients = self.preconditioning
        network_input_BCHW = coefficients.c_in(sigma_B111) * x_BCHW
        # Only the network may run in low precision: the sum below cancels at small sigma.
        f_BCHW = self.network(network_input_BCHW, coefficients.c_noise(sigma_B), conditioning)
        skip_BCHW = coefficients.c_skip(sigma_B111) * x_BCHW
        return skip_BCHW + coefficients.c_out(sigma_B111) * f_BCHW.float()
