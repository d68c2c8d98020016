"""DeepSpeed around a denoiser: process group, ZeRO stages 0-3, one optimizer step.

The only module that imports deepspeed, and only inside functions: `DS_ACCELERATOR` must be decided
before. Nothing here compiles code at run time, so no compiler is needed on the workers.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ediffi.train.config import TrainConfig


@dataclass(frozen=True)
class Worker:
    """This process among those that train one denoiser together."""

    rank: int
    world_size: int
    device: torch.device


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


def make_engine(denoiser: nn.Module, config: TrainConfig, worker: Worker) -> Any:
    """Wrap `denoiser` in a DeepSpeed engine with AdamW; the engine is called like the denoiser.

    Weights, gradients and optimizer state are float32. bf16 is torch.autocast around the network
    alone: DeepSpeed's own bf16 mode takes another optimizer path at stage 0.
    """
    deepspeed = _import_deepspeed()
    denoiser.to(worker.device)
    if config.precision == "bf16":
        network: Any = denoiser.network
        network.forward = torch.autocast(worker.device.type, torch.bfloat16)(network.forward)
    optimizer = torch.optim.AdamW(
        denoiser.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(
        model=denoiser, optimizer=optimizer, config=_deepspeed_config(config, worker.world_size)
    )
    _secure_files(engine.checkpoint_engine)
    return engine


def take_step(engine: Any, grad_clip: float) -> float:
    """Clip and apply the gradients once the last micro-batch has gone backward; zero them.

    Returns the gradient's 2-norm over all ranks before clipping: not finite when training has
    diverged, and nan for the micro-batches before the last, which only accumulate.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return float("nan")
    if engine.zero_optimization_stage() == 0:  # DeepSpeed clips here too, but tells no norm
        norm = nn.utils.clip_grad_norm_(engine.module.parameters(), grad_clip)
        engine.step()
        return float(norm)
    engine.step()
    return float(engine.get_global_grad_norm())


def set_lr(engine: Any, lr: float) -> None:
    """Learning rate of the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def _deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    micro_images = config.micro_batch(world_size)
    return {
        "train_batch_size": config.batch_images,
        "train_micro_batch_size_per_gpu": micro_images,
        "gradient_accumulation_steps": config.batch_images // (micro_images * world_size),
        "gradient_clipping": config.grad_clip if config.zero_stage else 0.0,  # see take_step
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": sys.maxsize,
    }


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
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated")
    return deepspeed


def _secure_files(checkpoint_engine: Any) -> None:
    """Make DeepSpeed's files durable when written, and never run code when read.

    ZeRO's files pickle three small classes besides tensors. Allowing exactly these lets
    `weights_only` refuse everything else, where DeepSpeed itself would unpickle anything.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    write = checkpoint_engine.save

    def save(state_dict: dict[str, Any], path: str) -> None:
        write(state_dict, path)
        flush(Path(path))

    def load(path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, map_location=map_location, weights_only=True)

    checkpoint_engine.save, checkpoint_engine.load = save, load


def flush(path: Path) -> None:
    """Force a file's bytes, or a directory's entries, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
