"""How one denoiser is trained: every length is counted in images seen, never steps or epochs.

The paper's values (eDiff-I section 5 and its tables): AdamW, lr 1e-4, weight decay 0.01, betas 0.9
and 0.999, batch 2048, EMA 0.9999 (a half-life of about 14 million images at that batch).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Schedule = Literal["constant", "cosine", "linear"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Hyperparameters of one training run, base or expert.

    Raises:
        ValueError: a field is out of range; the message names it, what was required and found.
    """

    total_images: int  # rounded up to whole batches: see `final_images`
    batch_images: int = 256  # images per optimizer step, over all ranks
    micro_batch_images: int = 256  # at most so many images in one forward pass of one rank
    lr: float = 1e-4
    warmup_images: int = 0  # linear from zero
    lr_schedule: Schedule = "constant"  # cosine and linear fall to zero at `final_images`
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    grad_clip: float = 1.0  # largest 2-norm of the whole gradient
    ema_half_life_images: int
    ema_ramp_fraction: float = 0.05  # the half-life is at most this fraction of the images seen
    precision: Precision = "fp32"  # bf16: autocast in the network, fp32 weights and optimizer
    zero_stage: int = 0
    checkpoint_images: int
    keep_checkpoints: int = 2
    log_images: int
    data_workers: int = 0  # processes that prepare batches; 0: the training process does
    seed: int = 0
    flip: bool = False  # mirror every other image, by a coin of its own

    def __post_init__(self) -> None:
        """Check every field; see the class."""
        for field in (
            *("total_images", "batch_images", "micro_batch_images", "ema_half_life_images"),
            *("checkpoint_images", "keep_checkpoints", "log_images"),
        ):
            self._require(field, getattr(self, field) >= 1, "at least 1")
        for field in ("warmup_images", "weight_decay", "data_workers"):
            self._require(field, getattr(self, field) >= 0, "zero or positive")
        for field in ("lr", "grad_clip", "ema_ramp_fraction"):
            value = getattr(self, field)
            self._require(field, value > 0 and math.isfinite(value), "positive and finite")
        for field in ("beta1", "beta2"):
            self._require(field, 0 <= getattr(self, field) < 1, "in [0, 1)")
        self._require("seed", 0 <= self.seed < 2**64, "in [0, 2^64)")
        self._require("zero_stage", self.zero_stage in (0, 1, 2, 3), "0, 1, 2 or 3")
        self._require("lr_schedule", self.lr_schedule in get_args(Schedule), get_args(Schedule))
        self._require("precision", self.precision in get_args(Precision), get_args(Precision))
        self._require(
            "warmup_images", self.warmup_images < self.total_images, "less than total_images"
        )
        self.micro_batch(world_size=1)

    @property
    def final_images(self) -> int:
        """Images seen when training ends: `total_images` rounded up to whole batches."""
        return math.ceil(self.total_images / self.batch_images) * self.batch_images

    def micro_batch(self, world_size: int) -> int:
        """Images in one forward pass of one rank.

        Raises:
            ValueError: the batch does not divide into equal micro-batches over `world_size` ranks.
        """
        rank_images, rest = divmod(self.batch_images, world_size)
        if rest or not rank_images:
            raise ValueError(
                f"batch_images must be a multiple of the {world_size} ranks, got "
                f"{self.batch_images}: change batch_images or the number of ranks"
            )
        micro_images = min(self.micro_batch_images, rank_images)
        if rank_images % micro_images:
            raise ValueError(
                f"micro_batch_images must divide the {rank_images} images that each of "
                f"{world_size} ranks has of a batch, got {self.micro_batch_images}: "
                f"use a divisor of {rank_images}"
            )
        return micro_images

    def lr_at(self, images: float) -> float:
        """Learning rate after `images`; the loop asks for the middle of each batch."""
        if images < self.warmup_images:
            return self.lr * images / self.warmup_images
        if self.lr_schedule == "constant":
            return self.lr
        progress = (images - self.warmup_images) / (self.final_images - self.warmup_images)
        if self.lr_schedule == "linear":
            return self.lr * (1 - progress)
        return self.lr * (1 + math.cos(math.pi * progress)) / 2

    def _require(self, field: str, valid: bool, required: object) -> None:
        if not valid:
            found = getattr(self, field)
            raise ValueError(f"train.{field} must be {required}, got {found!r}: change {field}")
