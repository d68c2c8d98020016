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
Offload = Literal["none", "cpu"]
EmaProfile = Literal["half_life", "power"]
OnSpike = Literal["stop", "skip", "rollback", "lower_rate"]

# Literal fields and what they allow.
_CHOICES = {
    "lr_schedule": get_args(Schedule),
    "precision": get_args(Precision),
    "offload_optimizer": get_args(Offload),
    "offload_parameters": get_args(Offload),
    "ema_profile": get_args(EmaProfile),
    "on_spike": get_args(OnSpike),
}


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
    on_spike: OnSpike = "stop"  # a step whose gradient is not finite, or a spike; see `guard`
    spike_factor: float = 0.0  # a spike: so many times the running norm; 0: only not finite
    max_spikes: int = 10  # more of them stop the training whatever `on_spike` says
    ema_profile: EmaProfile = "half_life"
    ema_half_life_images: int = 0  # of profile half_life, which must give it
    ema_ramp_fraction: float = 0.05  # the half-life is at most this fraction of the images seen
    ema_std: float = 0.05  # of profile power: relative width of the average that is the result
    ema_track_stds: tuple[float, ...] = (0.05, 0.10)  # widths kept while training, for any later
    ema_snapshot_images: int = 0  # power: the tracked averages are stored so often; 0: at the end
    precision: Precision = "fp32"  # bf16: autocast in the network, fp32 weights and optimizer
    compile: bool = False  # torch.compile the network; up to ZeRO 2
    gradient_checkpointing: bool = False  # compute blocks again backwards instead of keeping them
    zero_stage: int = 0
    offload_optimizer: Offload = "none"  # ZeRO 1 to 3: where moments and fp32 weights live
    offload_parameters: Offload = "none"  # ZeRO 3: where parameters wait
    checkpoint_images: int
    keep_checkpoints: int = 2
    keep_every_images: int = 0  # besides, one checkpoint in so many images is kept; 0: none
    log_images: int
    held_out_images: int = 0  # the loss on held-out samples is measured so often; 0: never
    held_out_samples: int = 256
    grid_images: int = 0  # a grid of pictures is drawn so often; 0: never
    data_workers: int = 0  # processes that prepare batches; 0: the training process does
    seed: int = 0
    flip: bool = False  # mirror every other image, by a coin of its own

    def __post_init__(self) -> None:
        """Check every field; see the class."""
        self._check_numbers()
        for field, choices in _CHOICES.items():
            self._require(field, getattr(self, field) in choices, f"one of {', '.join(choices)}")
        self._require(
            "warmup_images", self.warmup_images < self.total_images, "less than total_images"
        )
        self._check_averages()
        self._check_sharding()
        self.micro_batch(world_size=1)

    def _check_numbers(self) -> None:
        for field in (
            *("total_images", "batch_images", "micro_batch_images", "checkpoint_images"),
            *("keep_checkpoints", "log_images"),
        ):
            self._require(field, getattr(self, field) >= 1, "at least 1")
        self._require("held_out_samples", self.held_out_samples >= 2, "at least 2")
        for field in (
            *("warmup_images", "weight_decay", "data_workers", "spike_factor", "max_spikes"),
            *("ema_half_life_images", "ema_snapshot_images", "keep_every_images"),
            *("held_out_images", "grid_images"),
        ):
            self._require(field, getattr(self, field) >= 0, "zero or positive")
        for field in ("lr", "grad_clip", "ema_ramp_fraction"):
            value = getattr(self, field)
            self._require(field, value > 0 and math.isfinite(value), "positive and finite")
        for field in ("beta1", "beta2"):
            self._require(field, 0 <= getattr(self, field) < 1, "in [0, 1)")
        self._require("spike_factor", not 0 < self.spike_factor <= 1, "0 (off) or greater than 1")
        self._require("seed", 0 <= self.seed < 2**64, "in [0, 2^64)")
        self._require("zero_stage", self.zero_stage in (0, 1, 2, 3), "0, 1, 2 or 3")

    def _check_averages(self) -> None:
        if self.ema_profile == "half_life":
            self._require("ema_half_life_images", self.ema_half_life_images >= 1, "at least 1")
            return
        # 1 / sqrt(12) is the relative width of a plain mean over all of training
        required = "between 0 and 0.28, as in EDM2"
        self._require("ema_std", 0 < self.ema_std < 0.28, required)
        tracked = self.ema_track_stds
        valid = all(0 < std < 0.28 for std in tracked) and len(set(tracked)) == len(tracked) >= 2
        self._require("ema_track_stds", valid, f"two or more different widths {required}")

    def _check_sharding(self) -> None:
        # DeepSpeed gathers weights as they are touched: the compiler would see empty ones.
        self._require("compile", not self.compile or self.zero_stage < 3, "false at zero_stage 3")
        self._require(
            "offload_optimizer",
            self.offload_optimizer == "none" or self.zero_stage >= 1,
            "none at zero_stage 0",
        )
        self._require(
            "offload_parameters",
            self.offload_parameters == "none" or self.zero_stage == 3,
            "none below zero_stage 3",
        )

    @property
    def final_images(self) -> int:
        """Images seen when training ends: `total_images` rounded up to whole batches."""
        return math.ceil(self.total_images / self.batch_images) * self.batch_images

    def crosses(self, images_seen: int, every_images: int) -> bool:
        """Whether the batch that ends at `images_seen` reached a multiple; 0: never."""
        if not every_images:
            return False
        return images_seen // every_images > (images_seen - self.batch_images) // every_images

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
