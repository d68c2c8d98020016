"""DeepSpeed around a denoiser: process group, ZeRO stages 0-3, one optimizer step.

The only module that imports deepspeed, and only inside functions: `DS_ACCELERATOR` must be decided
before. Nothing here compiles DeepSpeed's extensions at run time, so no compiler is needed on the
workers; `TrainConfig.compile` asks torch to compile the network, which needs one.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ediffi.train.config import TrainConfig
from ediffi.train.optimizer import Guard, GuardedAdamW


@dataclass(frozen=True)
class Worker:
    """This process among those that train one denoiser together."""

    rank: int
    world_size: int
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Step:
    """What became of one batch."""

    grad_norm: float  # 2-norm over all ranks before clipping; inf if it was not finite
    taken: bool  # False: the guard refused, weights and optimizer state are as before


def join_process_group() -> Worker:
    """Use the launcher's process group, or make one of this process alone.

    A launcher that only sets torch's environment variables (torchrun) is joined through them.
    """
    has_cuda = torch.cuda.is_available()
    if not dist.is_initialized():
        backend = "nccl" if has_cuda else "gloo"
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group(backend)
        else:  # an in-process store: no port to find, none to clash with
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # DeepSpeed insists on LOCAL_RANK, and takes the GPU of that number.
    os.environ.setdefault("LOCAL_RANK", str(torch.cuda.current_device() if has_cuda else 0))
    device = torch.device("cpu")
    if has_cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return Worker(dist.get_rank(), dist.get_world_size(), device)


def make_engine(denoiser: nn.Module, config: TrainConfig, worker: Worker, guard: Guard) -> Any:
    """Wrap `denoiser` in a DeepSpeed engine with AdamW; the engine is called like the denoiser.

    Weights, gradients and optimizer state are float32. bf16 is torch.autocast around the network
    alone: DeepSpeed's own bf16 mode takes another optimizer path at stage 0.

    Args:
        denoiser: has the network to train as its attribute `network`.
        config: precision, ZeRO stage, offload and optimizer.
        worker: this process.
        guard: asked once per optimizer step, on every rank, before weights change, with the norm
            of the gradient. False: the step is not taken and the gradients are dropped. It must
            answer alike on all ranks, which see the same norm.

    Raises:
        ValueError: this machine cannot do what `config` asks for.
    """
    deepspeed = _import_deepspeed()
    denoiser.to(worker.device)
    _prepare_network(denoiser.network, config, worker)
    engine, *_ = deepspeed.initialize(
        model=denoiser,
        optimizer=GuardedAdamW(denoiser.parameters(), config, guard),
        config=_deepspeed_config(config, worker.world_size),
    )
    if worker.world_size == 1 and config.zero_stage == 0:
        engine.enable_backward_allreduce = False  # it would copy all gradients to sum one of each
    return engine


def take_step(engine: Any, config: TrainConfig) -> Step | None:
    """Clip and apply the gradients once the last micro-batch has gone backward; zero them.

    Returns:
        What became of the step; None after the micro-batches before the last, which only
        accumulate.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    optimizer: GuardedAdamW = engine.basic_optimizer
    if engine.zero_optimization_stage() == 0:  # DeepSpeed clips here too, but tells no norm
        norm = _told(nn.utils.clip_grad_norm_(engine.module.parameters(), config.grad_clip))
        optimizer.ask_again(lambda: norm)
        engine.step()
    else:
        # Known when DeepSpeed calls the optimizer, which it does not if the norm is not finite.
        optimizer.ask_again(lambda: _told(engine.optimizer._global_grad_norm))
        engine.step()
        norm = _told(engine.get_global_grad_norm())
    return Step(grad_norm=norm, taken=optimizer.ask(norm))


def _told(norm: Tensor | float) -> float:
    """A norm that is not finite is inf, as DeepSpeed has it at stages 1 to 3."""
    value = float(norm)
    return value if math.isfinite(value) else math.inf


def set_lr(engine: Any, lr: float) -> None:
    """Learning rate of the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def _prepare_network(network: Any, config: TrainConfig, worker: Worker) -> None:
    """Say to the network how it is to be computed; parameters and their names stay."""
    if config.gradient_checkpointing:
        if not hasattr(network, "gradient_checkpointing"):
            raise ValueError(
                f"train.gradient_checkpointing must be false for a {type(network).__name__}, "
                "which cannot do it, got true: change gradient_checkpointing"
            )
        network.gradient_checkpointing = True
    if config.compile:
        network.forward = torch.compile(network.forward)
    if config.precision == "bf16":
        network.forward = torch.autocast(worker.device.type, torch.bfloat16)(network.forward)


def _deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    micro_images = config.micro_batch(world_size)
    return {
        "train_batch_size": config.batch_images,
        "train_micro_batch_size_per_gpu": micro_images,
        "gradient_accumulation_steps": config.batch_images // (micro_images * world_size),
        "gradient_clipping": config.grad_clip if config.zero_stage else 0.0,  # see take_step
        "zero_optimization": {
            "stage": config.zero_stage,
            "offload_optimizer": _place(config.offload_optimizer),
            "offload_param": _place(config.offload_parameters),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own is compiled on first use
        "steps_per_print": sys.maxsize,
    }


def _place(place: str) -> dict[str, Any]:
    """Where DeepSpeed puts what is offloaded; pinned memory is of use to GPUs alone."""
    return {"device": place, "pin_memory": place == "cpu" and torch.cuda.is_available()}


@cache
def _import_deepspeed() -> ModuleType:
    """Import deepspeed so that it neither compiles extensions nor fills the log."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if not torch.cuda.is_available():
        # A shared-memory all-reduce that would be compiled here. `import deepspeed.comm.torch as x`
        # gives torch itself, hence sys.modules.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_tells_news)
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated")
    return deepspeed


def _tells_news(record: logging.LogRecord) -> bool:
    """Pass over what is meant so: our own AdamW, and steps whose refusal the guard tells."""
    message = record.getMessage()
    return not any(known in message for known in ("untested optimizer", "OVERFLOW! Skipping"))
