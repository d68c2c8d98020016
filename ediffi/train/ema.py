"""Averages of the weights while training: by half-life in images, or by powers (EDM2, section 3).

Half-life: decay per step = 0.5 ** (batch_images / half_life), where the half-life ramps up with the
images seen so that the random initial weights are forgotten quickly. The paper's EMA 0.9999 at
batch 2048 is a half-life of about 14.2 million images. Powers: see `ediffi.power_ema`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ediffi.power_ema import decay as power_decay
from ediffi.power_ema import gamma_of
from ediffi.train.config import TrainConfig

if TYPE_CHECKING:
    from ediffi.train.state import Fragment, Read

HALF_LIFE_KIND = "ema"


def power_kind(std: float) -> str:
    """What the tracked average of width `std` is called in checkpoints."""
    return f"ema_std_{std!r}"


def half_life_decay(config: TrainConfig, images_seen: int) -> float:
    """Weight that the old average keeps in the step which ends at `images_seen` (> 0)."""
    half_life_images = min(config.ema_half_life_images, config.ema_ramp_fraction * images_seen)
    return 0.5 ** (config.batch_images / half_life_images)


class Averages:
    """Float32 averages of this rank's share of the weights, updated after every batch.

    They start as copies of the weights. Every rank averages only its own fragments, without
    communication, so the cost is divided among the ranks at every ZeRO stage.

    Args:
        config: says which averages there are.
        fragments: this rank's share of the weights, live views.
        images_before: images that the ancestors saw, where their average is carried on; it counts
            as that old, so it is not forgotten as a young one would be.

    Attributes:
        kinds: names of the averages: `ema`, or one for each of `config.ema_track_stds`.
    """

    def __init__(
        self, config: TrainConfig, fragments: Sequence[Fragment], *, images_before: int = 0
    ) -> None:
        self._config = config
        self._fragments = tuple(fragments)
        self._images_before = images_before
        self._gammas = {}
        if config.ema_profile == "power":
            self._gammas = {power_kind(std): gamma_of(std) for std in config.ema_track_stds}
        self.kinds: tuple[str, ...] = tuple(self._gammas) or (HALF_LIFE_KIND,)
        self._averages = {
            kind: [fragment.weights.detach().clone() for fragment in self._fragments]
            for kind in self.kinds
        }

    def tensors(self) -> dict[str, list[Tensor]]:
        """The averages by kind, aligned with the fragments; live, not copies."""
        return self._averages

    @torch.no_grad()
    def update(self, images_seen: int) -> None:
        """Take the current weights into every average, after the batch that ends at `images_seen`.

        Called once a batch, also after a step that was not taken: the profile counts images.
        """
        weights = [fragment.weights for fragment in self._fragments]
        if not weights:  # a rank may own nothing of a very small network
            return
        for kind, averages in self._averages.items():
            new = 1 - self._decay(kind, self._images_before + images_seen)
            torch._foreach_lerp_(averages, weights, new)

    def load(self, read: Read) -> None:
        """Take the averages from a checkpoint, bit by bit."""
        for kind, averages in self._averages.items():
            for fragment, average in zip(self._fragments, averages):
                average.copy_(read(kind, fragment.name, fragment.start, average.numel()))

    def _decay(self, kind: str, age_images: int) -> float:
        if kind == HALF_LIFE_KIND:
            return half_life_decay(self._config, age_images)
        return power_decay(self._gammas[kind], age_images, self._config.batch_images)
