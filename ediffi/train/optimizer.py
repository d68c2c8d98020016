"""AdamW that asks before it changes weights, with moments that exist from the start."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ediffi.train.config import TrainConfig

# Asked with the gradient's 2-norm before clipping, over all ranks; False: leave the weights alone.
Guard = Callable[[float], bool]

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of AdamW's first and second moment


class GuardedAdamW(torch.optim.AdamW):
    """AdamW whose step does nothing when the guard refuses the gradient.

    DeepSpeed clips, partitions and steps in one call, and at stage 3 steps once for each group of
    parameters, so the question has to be asked in here, and its answer kept until `ask_again`.

    Args:
        parameters: what to train.
        config: learning rate, betas and weight decay.
        guard: see `Guard`; a norm that is not finite is refused whatever it answers.
    """

    def __init__(self, parameters: Iterable[Tensor], config: TrainConfig, guard: Guard) -> None:
        super().__init__(
            parameters,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._guard = guard
        self._norm_of_step: Callable[[], float] = lambda: math.nan
        self.answer: bool | None = None  # of this step; None: not asked yet

    def ask_again(self, norm_of_step: Callable[[], float]) -> None:
        """Begin another step.

        Args:
            norm_of_step: tells the gradient's norm, which may be known only when `step` is called.
        """
        self._norm_of_step = norm_of_step
        self.answer = None

    def ask(self, norm: float) -> bool:
        """Ask the guard, once a step; later calls repeat the answer."""
        if self.answer is None:
            self.answer = self._guard(norm) and math.isfinite(norm)
        return self.answer

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the weights if the guard allows it."""
        if self.ask(self._norm_of_step()):
            return super().step(closure)
        return None

    def moments_of(self, weights: Tensor) -> dict[str, Tensor]:
        """Moments of one tensor being trained; zeros before the first step, as torch makes them."""
        state = self.state[weights]
        if not state:
            # Where the fused kernel expects its count of steps: beside the weights.
            state["step"] = torch.zeros((), dtype=torch.float32, device=weights.device)
            for kind in MOMENTS:
                state[kind] = torch.zeros_like(weights, memory_format=torch.preserve_format)
        return {kind: state[kind] for kind in MOMENTS}

    @property
    def num_steps(self) -> int:
        """Steps taken, which AdamW's bias correction depends on."""
        return max((int(state["step"].item()) for state in self.state.values()), default=0)

    @num_steps.setter
    def num_steps(self, value: int) -> None:
        for state in self.state.values():
            state["step"].fill_(value)
