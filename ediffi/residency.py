"""Which experts' weights are on the device, and where the others wait.

An ensemble as large as the paper's does not fit on one device at once, and need not: sampling walks
down the noise axis, so that experts take turns and each is needed for a while. All denoisers of an
ensemble have the same network, so a budget in bytes is a number of denoisers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ediffi.conditioning import Conditioning
from ediffi.preconditioning import Denoiser

Load = Literal["eager", "lazy"]
Offload = Literal["cpu", "disk"]

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Residency:
    """When weights are read, how much of them may lie on the device, and where the rest waits.

    The budget counts weights alone; what a network call needs beside them comes on top.
    """

    load: Load = "eager"  # eager: all files are read and checked at once; lazy: when first called
    device_gib: float = 0.0  # weights on the device at most; 0: no limit
    offload: Offload = "cpu"  # where the least recently used go; disk: dropped, to be read again

    def __post_init__(self) -> None:
        """Raise ValueError for a choice that does not exist or a negative or infinite budget."""
        for field, choices in (("load", get_args(Load)), ("offload", get_args(Offload))):
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"{field} must be one of {', '.join(choices)}, got {getattr(self, field)!r}"
                )
        if not (math.isfinite(self.device_gib) and self.device_gib >= 0):
            raise ValueError(
                f"device_gib must be finite and not negative, got {self.device_gib}: 0 is no limit"
            )

    @property
    def holds_all(self) -> bool:
        """Whether every denoiser is on the device from the start and stays there."""
        return self.load == "eager" and self.device_gib == 0


HOLD_ALL = Residency()


class Residents:
    """The denoisers whose weights are on one device, least recently used first.

    Args:
        device: where denoisers are called.
        residency: the budget, and where those wait that are over it.
        denoiser_bytes: weights of one denoiser.

    Raises:
        ValueError: not even one denoiser fits, or waiting on the CPU would free nothing.
    """

    def __init__(
        self, *, device: str | torch.device, residency: Residency, denoiser_bytes: int
    ) -> None:
        self.device, self.residency = torch.device(device), residency
        budget_bytes = residency.device_gib * _GIB
        self.capacity = math.floor(budget_bytes / denoiser_bytes) if budget_bytes else math.inf
        if self.capacity < 1:
            raise ValueError(
                f"device_gib must hold the weights of one expert, {denoiser_bytes / _GIB:.3g} GiB; "
                f"got {residency.device_gib:g}: give it more, or 0 for no limit"
            )
        if self.is_limited and residency.offload == "cpu" and self.device.type == "cpu":
            raise ValueError(
                "offload must be 'disk' where the device is the CPU and device_gib is limited: "
                "moving weights from the CPU to the CPU frees nothing"
            )
        self._denoisers: list[OnDemand] = []

    @property
    def is_limited(self) -> bool:
        """Whether a denoiser may ever have to go."""
        return self.capacity < math.inf

    @property
    def names(self) -> tuple[str, ...]:
        """Who is on the device, least recently used first."""
        return tuple(denoiser.name for denoiser in self._denoisers)

    def take(self, wanted: OnDemand) -> Denoiser:
        """Return a denoiser, on the device; others leave first if there is no room.

        Raises:
            SnapshotError: its file is missing or damaged.
        """
        if wanted in self._denoisers:
            self._denoisers.remove(wanted)
        come_back = self.is_limited and self.residency.offload == "cpu"
        # Sampling may run in inference mode; weights made there could never see a gradient.
        with torch.inference_mode(False):
            while len(self._denoisers) >= self.capacity:
                self._denoisers.pop(0).leave()
            denoiser = wanted.arrive(self.device, come_back=come_back)
        self._denoisers.append(wanted)
        return denoiser


class OnDemand:
    """A denoiser whose weights come to the device when it is called.

    No torch module, so that nothing but `Residents` moves its weights.

    Args:
        name: of the weights.
        read: reads and checks the weights' file; gives the denoiser on the CPU.
        residents: of the device where it is called; shared by the denoisers of an ensemble.
    """

    def __init__(self, name: str, read: Callable[[], Denoiser], residents: Residents) -> None:
        self.name = name
        self._read, self._residents = read, residents
        self._denoiser: Denoiser | None = None
        self._on_cpu: dict[str, Tensor] = {}  # what the weights on the device were copied from
        self._is_there = False

    def __call__(self, x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Estimate the clean images, as `Denoiser.forward` does."""
        denoised_BCHW: Tensor = self.bring()(x_BCHW, sigma_B, conditioning)
        return denoised_BCHW

    def bring(self) -> Denoiser:
        """Have the weights on the device, and return the denoiser."""
        return self._residents.take(self)

    def arrive(self, device: torch.device, *, come_back: bool) -> Denoiser:
        """Move the weights to the device, reading them first if they are nowhere.

        Args:
            device: where to.
            come_back: keep them on the CPU too, so that leaving is a matter of forgetting: they do
                not change, and need not be copied back.
        """
        if self._denoiser is None:
            self._denoiser = self._read()
        if not self._is_there:
            weights = self._denoiser.state_dict()
            there = {name: tensor.to(device) for name, tensor in weights.items()}
            self._denoiser.load_state_dict(there, assign=True)
            self._on_cpu, self._is_there = weights if come_back else {}, True
        return self._denoiser

    def leave(self) -> None:
        """Free the device's memory: back to the CPU if the weights are there, else to the file."""
        assert self._denoiser is not None, "only who has arrived can leave"
        if self._on_cpu:
            self._denoiser.load_state_dict(self._on_cpu, assign=True)
        else:
            self._denoiser = None
        self._on_cpu, self._is_there = {}, False
