"""What both sides of `benchmarks.unet_vs_diffusers` train on, and the step that is timed.

Shapes: B batch, C channels, H W pixels, T tokens, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.unet_vs_diffusers import NUM_TOKENS, TOKEN_WIDTH, Case


@dataclass(frozen=True)
class Inputs:
    """One batch: the same for all sides."""

    x_BCHW: Tensor
    c_noise_B: Tensor
    tokens_BTD: Tensor
    mask_BT: Tensor  # captions differ in length
    target_BCHW: Tensor


def inputs(case: Case) -> Inputs:
    """Draw a batch; every caption has from half of all tokens to all."""
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch_images, 3, case.image_px, case.image_px)
    lengths_B = torch.randint(
        NUM_TOKENS // 2, NUM_TOKENS + 1, (case.batch_images,), generator=generator
    )
    return Inputs(
        x_BCHW=torch.randn(shape, generator=generator),
        c_noise_B=torch.randn(case.batch_images, generator=generator) / 4,
        tokens_BTD=torch.randn(case.batch_images, NUM_TOKENS, TOKEN_WIDTH, generator=generator),
        mask_BT=torch.arange(NUM_TOKENS)[None] < lengths_B[:, None],
        target_BCHW=torch.randn(shape, generator=generator),
    )


class Side:
    """A network and its optimizer; `forward` maps `Inputs` to a picture."""

    def __init__(
        self, network: nn.Module, forward: Callable[[Inputs], Tensor], case: Case, precision: str
    ) -> None:
        self._network = network
        self._forward = forward
        self._inputs = inputs(case)
        self._precision = precision
        self._optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def facts(self) -> dict[str, Any]:
        """Parameters, and the work of forward and backward for one image."""
        # Fused attention on a CPU is not counted; as matrix products it is.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self._gradients()
        return {
            "num_parameters": sum(weight.numel() for weight in self._network.parameters()),
            "image_gflop": counter.get_total_flops() / len(self._inputs.x_BCHW) / 1e9,
        }

    def seconds(self, num_steps: int) -> float:
        """Time that many whole steps."""
        start_s = time.perf_counter()
        for _ in range(num_steps):
            self._optimizer.zero_grad(set_to_none=True)
            self._gradients()
            self._optimizer.step()
        return time.perf_counter() - start_s

    def _gradients(self) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._precision == "bf16"):
            found_BCHW = self._forward(self._inputs)
        (found_BCHW.float() - self._inputs.target_BCHW).square().mean().backward()


def case_of(fields: dict[str, Any]) -> Case:
    """A case as it came over the line: its tuples are lists."""
    tuples = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return Case(**(fields | tuples))
