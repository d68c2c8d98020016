"""What training does about a gradient that is not finite, or far larger than usual.

The guard judges the norm of every step's gradient before any weight changes; a step it refuses is
not taken. What else happens is the policy `train.on_spike`. All of it is a pure function of the
norms and of `Progress`, which checkpoints carry: a resumed run decides as an undisturbed one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ediffi.train.config import TrainConfig

if TYPE_CHECKING:
    from ediffi.train.checkpoint import Progress

# The usual norm is a geometric mean, in which one outlier weighs little: a plain mean of this many
# steps at first, then an exponential one of this horizon.
HORIZON_STEPS = 100
# Gradients shrink fast at first, from whatever the initial weights gave: no spikes before.
WARMUP_STEPS = 20
LOWER_RATE_FACTOR = 0.5  # what policy lower_rate multiplies the learning rate by, for good


class TrainingDiverged(ArithmeticError):
    """Gradients are not finite, or spike; the weights of the last checkpoint are from before."""


@dataclass(frozen=True, kw_only=True)
class Reaction:
    """What the loop does about a refused step, besides not taking it."""

    rolls_back: bool  # weights, moments and averages return to the last checkpoint
    lr_factor: float  # of the learning rate from now on
    message: str  # for people; to be said aloud


class SpikeGuard:
    """Decides for every optimizer step whether it may be taken.

    Called once per step with the 2-norm of the whole gradient, before clipping, the same on every
    rank. A norm that is not finite is refused always. With `spike_factor` above zero, so is one
    above `spike_factor` times the running geometric mean of the norms accepted before, except in
    the first `WARMUP_STEPS` batches of a run. A norm of exactly zero, as in DeepSpeed's trial step,
    is let pass and leaves no trace.

    Args:
        config: `spike_factor`, `on_spike`, `max_spikes` and `batch_images`.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._images_seen = 0
        self.norm_mean = 0.0  # 0: none yet
        self.reason = ""  # why the last step was refused; empty if it was not

    def resume(self, progress: Progress) -> None:
        """Go on from `progress`: its `images_seen` and `norm_mean`."""
        self._images_seen, self.norm_mean = progress.images_seen, progress.norm_mean

    def __call__(self, norm: float) -> bool:
        """Judge the gradient norm of the next step: True to take it."""
        self.reason = ""
        if norm == 0:
            return True
        num_steps_before = self._images_seen // self._config.batch_images
        self._images_seen += self._config.batch_images
        if not math.isfinite(norm):
            self.reason = f"the gradient norm is {norm} at {self._images_seen} images"
        elif norm > self._threshold(num_steps_before):
            self.reason = (
                f"the gradient norm is {norm:.4g} at {self._images_seen} images, more than "
                f"{self._config.spike_factor:g} times the usual {self.norm_mean:.4g}"
            )
        else:
            self._remember(norm, num_steps_before)
        return not self.reason

    def react(self, progress: Progress) -> Reaction:
        """Apply `train.on_spike` to the step just refused.

        - skip: that batch is lost, nothing else.
        - rollback: weights, moments and averages go back to the last checkpoint. The data do not:
          the images since then are not shown again, else the same batch would spike again.
        - lower_rate: as skip, and the learning rate is halved from then on.
        - stop, or more than `max_spikes` refused steps in one run: training ends.

        Args:
            progress: its `num_spikes` includes this one; `lr_factor` is that of this step.

        Raises:
            TrainingDiverged: training is to end; the message says why and what to do.
        """
        config, lr_factor = self._config, progress.lr_factor
        if config.on_spike == "stop":
            raise TrainingDiverged(
                f"{self.reason}: training stops, as train.on_spike says. Lower train.lr or raise "
                "train.warmup_images and start anew, or set train.on_spike to skip, rollback or "
                "lower_rate and go on"
            )
        if progress.num_spikes > config.max_spikes:
            raise TrainingDiverged(
                f"{self.reason}: training stops, because train.max_spikes allows "
                f"{config.max_spikes} such steps and this is number {progress.num_spikes}. Lower "
                "train.lr or raise train.warmup_images and start anew, or raise train.max_spikes"
            )
        done = "the batch is skipped"
        if config.on_spike == "rollback":
            done = "training goes back to the last checkpoint, and on with the images that follow"
        elif config.on_spike == "lower_rate":
            lr_factor *= LOWER_RATE_FACTOR
            done += f", and the learning rate is {lr_factor:g} of the planned one from now on"
        return Reaction(
            rolls_back=config.on_spike == "rollback",
            lr_factor=lr_factor,
            message=f"{self.reason}: {done} ({progress.num_spikes} of at most "
            f"{config.max_spikes} times)",
        )

    def _threshold(self, num_steps_before: int) -> float:
        is_settled = num_steps_before >= WARMUP_STEPS and self.norm_mean > 0
        if self._config.spike_factor == 0 or not is_settled:
            return math.inf
        return self._config.spike_factor * self.norm_mean

    def _remember(self, norm: float, num_steps_before: int) -> None:
        if self.norm_mean == 0:
            self.norm_mean = norm
            return
        weight = 1 / min(num_steps_before + 1, HORIZON_STEPS)
        self.norm_mean *= (norm / self.norm_mean) ** weight
