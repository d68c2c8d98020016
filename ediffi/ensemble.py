"""The ensemble of expert denoisers: each network call goes to the expert that owns its sigma.

eDiff-I section 4. Routing is per call and per sample, never per step: the two calls of a Heun step
that straddles an edge go to two experts. `Blend` has the alternative that is often guessed, a
weighted average of all experts, so that the two can be compared.

Shape legend: B batch, C channels, H W pixels, N experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ediffi.conditioning import Conditioning
from ediffi.noise import NoiseInterval, check_tiling
from ediffi.preconditioning import DenoiserFn

BlendKind = Literal["route", "average"]


@dataclass(frozen=True, kw_only=True)
class Blend:
    """How the experts' answers become one.

    `route` is the paper's: the owner of sigma alone is asked. `average` asks all of them, at as
    many times the cost, and weighs them: `alpha` for the owner, the rest in equal shares.
    """

    kind: BlendKind = "route"
    alpha: float = 0.9  # weight of the owner in an average; an only expert has all

    def __post_init__(self) -> None:
        """Raise ValueError for a kind that does not exist or a weight outside [0, 1]."""
        if self.kind not in get_args(BlendKind):
            raise ValueError(
                f"kind must be one of {', '.join(get_args(BlendKind))}, got {self.kind!r}"
            )
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {self.alpha}: it is a share")


ROUTE = Blend()


class Ensemble(nn.Module):
    """A denoiser that sends every sample to the expert whose noise interval holds its sigma.

    Args:
        experts: name -> (interval, denoiser); the intervals must tile [0, inf). Denoisers that are
            torch modules become submodules.
        blend: how their answers become one.
        stand_ins: names of experts whose own weights are missing, so that another answers.

    Attributes:
        names: experts from the least to the most noisy.
        intervals: interval of each expert, in that order.
        calls: num network calls per expert since construction or `reset_calls`.

    Raises:
        ValueError: the intervals leave a gap or overlap, or a stand-in is no expert.
    """

    def __init__(
        self,
        experts: Mapping[str, tuple[NoiseInterval, DenoiserFn]],
        *,
        blend: Blend = ROUTE,
        stand_ins: Sequence[str] = (),
    ) -> None:
        super().__init__()
        check_tiling({name: interval for name, (interval, _) in experts.items()})
        if unknown := sorted(set(stand_ins) - set(experts)):
            raise ValueError(f"stand_ins must be experts ({', '.join(experts)}), got {unknown}")
        ordered = sorted(experts.items(), key=lambda item: item[1][0].sigma_min)
        self.names = tuple(name for name, _ in ordered)
        self.intervals = tuple(interval for _, (interval, _) in ordered)
        self.blend, self.stand_ins = blend, tuple(n for n in self.names if n in stand_ins)
        self._denoisers = tuple(denoiser for _, (_, denoiser) in ordered)
        self.experts = nn.ModuleList(d for d in self._denoisers if isinstance(d, nn.Module))
        # No buffer: it must stay float64 and on the CPU whatever becomes of the weights.
        self._edges = torch.tensor([i.sigma_max for i in self.intervals[:-1]], dtype=torch.float64)
        self.calls: Counter[str] = Counter()

    def forward(self, x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Estimate the clean images, float32; a batch within one interval is a single call.

        Raises:
            ValueError: a noise level is zero, negative or NaN.
        """
        index_B = self._route(sigma_B)
        if self.blend.kind == "average":
            return self._average(index_B, x_BCHW, sigma_B, conditioning)
        used = index_B.unique().tolist()
        if len(used) == 1:
            return self._call(used[0], x_BCHW, sigma_B, conditioning)
        denoised_BCHW = torch.empty_like(x_BCHW, dtype=torch.float32)
        for expert_index in used:
            rows = (index_B == expert_index).nonzero().flatten().to(x_BCHW.device)
            denoised_BCHW[rows] = self._call(
                expert_index, x_BCHW[rows], sigma_B[rows], conditioning.select(rows)
            )
        return denoised_BCHW

    def reset_calls(self) -> None:
        """Start counting network calls from zero."""
        self.calls.clear()

    def _route(self, sigma_B: Tensor) -> Tensor:
        """Index of the expert of each sample, (B,) on the CPU: one wait for the device per call."""
        sigma_B = sigma_B.detach().to("cpu", torch.float64)
        if not (sigma_B > 0).all():
            raise ValueError(f"noise levels must be positive, got {sigma_B.tolist()}")
        return torch.bucketize(sigma_B, self._edges, right=True)  # right: an edge belongs above

    def _average(
        self, index_B: Tensor, x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Weigh the answers of all experts, those of the owners most."""
        num_others = len(self.names) - 1
        share = (1 - self.blend.alpha) / num_others if num_others else 0.0
        weight_BN = torch.full((len(index_B), len(self.names)), share)
        weight_BN.scatter_(1, index_B[:, None], self.blend.alpha if num_others else 1.0)
        weight_NB111 = weight_BN.T[..., None, None, None].to(x_BCHW.device)
        denoised_BCHW = torch.zeros_like(x_BCHW, dtype=torch.float32)
        for expert_index, weight_B111 in enumerate(weight_NB111):
            answer_BCHW = self._call(expert_index, x_BCHW, sigma_B, conditioning)
            denoised_BCHW = denoised_BCHW + weight_B111 * answer_BCHW
        return denoised_BCHW

    def _call(
        self, index: int, x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning
    ) -> Tensor:
        self.calls[self.names[index]] += 1
        return self._denoisers[index](x_BCHW, sigma_B, conditioning)
