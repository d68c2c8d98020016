"""Exponential moving average of the weights, by half-life in images (EDM2's parametrisation).

decay per step = 0.5 ** (batch_images / half_life), where the half-life ramps up with the images
seen so that the random initial weights are forgotten quickly. The paper's EMA 0.9999 at batch 2048
is a half-life of about 14.2 million images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ediffi.train.config import TrainConfig


def ema_decay(config: TrainConfig, images_seen: int) -> float:
    """Weight that the old average keeps in the step which ends at `images_seen` (> 0)."""
    half_life_images = min(config.ema_half_life_images, config.ema_ramp_fraction * images_seen)
    return 0.5 ** (config.batch_images / half_life_images)


class EMA:
    """Float32 average of a module's parameters, updated after every optimizer step.

    Under ZeRO-3 every rank averages only its own partition, without communication; `gather` and
    `load` convert from and to whole tensors. Otherwise each rank holds the whole average.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parameters = dict(module.named_parameters())
        self._averages = [_local(parameter).clone() for parameter in self._parameters.values()]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Let the average keep `decay` of itself and take the rest from the current weights."""
        weights = [_local(parameter) for parameter in self._parameters.values()]
        torch._foreach_lerp_(self._averages, weights, 1 - decay)

    def gather(self) -> dict[str, Tensor]:
        """Whole averaged state on every rank, with the module's names; collective under ZeRO-3.

        Persistent buffers are the module's own.
        """
        state = {
            name: _whole(average, parameter)
            for (name, parameter), average in zip(self._parameters.items(), self._averages)
        }
        persistent = self._module.state_dict().keys()
        buffers = {name: b for name, b in self._module.named_buffers() if name in persistent}
        return state | buffers

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the average from what `gather` gave, on any number of ranks."""
        for (name, parameter), average in zip(self._parameters.items(), self._averages):
            average.copy_(_part(state[name], parameter))


# DeepSpeed gives a partitioned parameter the attributes ds_tensor (this rank's part of the flat
# weights), ds_numel and ds_shape; hence Any.


def _local(parameter: Any) -> Tensor:
    """What this rank holds: the parameter, or its partition under ZeRO-3."""
    return getattr(parameter, "ds_tensor", parameter).detach()


def _whole(part: Tensor, parameter: Any) -> Tensor:
    if not hasattr(parameter, "ds_tensor"):
        return part
    flat = part.new_empty(part.numel() * dist.get_world_size())
    dist.all_gather(list(flat.chunk(dist.get_world_size())), part)
    return flat[: parameter.ds_numel].view(parameter.ds_shape)


def _part(whole: Tensor, parameter: Any) -> Tensor:
    """Cut as DeepSpeed does: equal contiguous parts, the last one padded."""
    if not hasattr(parameter, "ds_tensor"):
        return whole
    num_elements = parameter.ds_tensor.numel()
    padding = num_elements * dist.get_world_size() - whole.numel()
    flat = nn.functional.pad(whole.flatten(), (0, padding))
    return flat.narrow(0, dist.get_rank() * num_elements, num_elements)
