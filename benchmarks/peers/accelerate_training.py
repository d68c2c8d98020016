"""The training script pattern of diffusers' examples, with accelerate, on our small problem.

As in their text-to-image example: a shuffling DataLoader, noise and noise levels from the global
generator, `save_state` every so many steps, and on resume `load_state`, the step number from the
folder's name, and the epoch that this step lies in. Network, loss and pictures are ours.

Variants: `script` is that pattern as published, which begins the epoch anew; `skip` passes over
the batches already seen, as accelerate's documentation says; `seedable` does so with its seedable
sampler; `stateful` has the seedable sampler and a stateful DataLoader, saved and restored instead.
All but the first tell the loader its epoch, which accelerate does not save (its issue 3996).
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.resume_problem import (
    BATCH_IMAGES,
    CHECKPOINT_STEPS,
    DISTRIBUTION,
    LR,
    NETWORK,
    PRECONDITIONING,
    SEED,
    TOTAL_STEPS,
    Diary,
    shards,
)
from ediffi.conditioning import Conditioning
from ediffi.loss import denoising_loss
from ediffi.noise import WHOLE
from ediffi.preconditioning import Denoiser
from ediffi.shards import JoinedShards, Sample
from ediffi.unet import UNet


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, or go on training, by one process or as one rank of several."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="of the run's checkpoints")
    parser.add_argument("--diary", type=Path, required=True)
    parser.add_argument("--kill-step", type=int, default=0)
    parser.add_argument("--variant", required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    accelerate: Any = importlib.import_module("accelerate")
    if options.variant == "stateful":  # before the loader: it patches torch's samplers
        importlib.import_module("torchdata.stateful_dataloader")
    accelerator = accelerate.Accelerator(
        cpu=True,
        dataloader_config=accelerate.DataLoaderConfiguration(
            use_seedable_sampler=options.variant in ("seedable", "stateful"),
            use_stateful_dataloader=options.variant == "stateful",
        ),
    )
    accelerate.utils.set_seed(SEED)
    denoiser = Denoiser(UNet(NETWORK), PRECONDITIONING)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=LR)
    loader = torch.utils.data.DataLoader(
        JoinedShards(shards(options.pictures), image_px=NETWORK.image_px),
        shuffle=True,
        collate_fn=_collate,
        batch_size=BATCH_IMAGES // accelerator.num_processes,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    denoiser, optimizer, loader, schedule = accelerator.prepare(
        denoiser, optimizer, loader, schedule
    )
    _train(accelerator, denoiser, optimizer, loader, schedule, options)


def _train(
    accelerator: Any, denoiser: nn.Module, optimizer: Any, loader: Any, schedule: Any, options: Any
) -> None:
    diary = Diary(options.diary, options.kill_step)
    saved = sorted(options.folder.glob("checkpoint-*"), key=_step_of)
    step = 0
    if saved:
        accelerator.load_state(str(saved[-1]))
        step = _step_of(saved[-1])
    first_epoch, num_done = divmod(step, len(loader))
    for epoch in range(first_epoch, TOTAL_STEPS // len(loader)):
        batches = loader
        if options.variant != "script":
            loader.set_epoch(epoch)
        if options.variant in ("skip", "seedable") and epoch == first_epoch:
            batches = accelerator.skip_first_batches(loader, num_done)
        for pictures, images_BCHW in batches:
            loss = _loss(denoiser, images_BCHW)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(denoiser.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            mean_loss = accelerator.gather(loss.detach()).mean().item()
            if step % CHECKPOINT_STEPS == 0:
                accelerator.save_state(str(options.folder / f"checkpoint-{step}"))
            diary.add(step, pictures, mean_loss)
            if step == TOTAL_STEPS:
                return


def _loss(denoiser: nn.Module, images_BCHW: Tensor) -> Tensor:
    """The same loss as ours; its draws come from the global generator."""
    sigma_B = DISTRIBUTION.sigma_at(torch.rand(len(images_BCHW), dtype=torch.float64), WHOLE)
    noise_BCHW = torch.randn_like(images_BCHW)
    nothing = Conditioning({}, len(images_BCHW))
    return denoising_loss(
        denoiser, images_BCHW, sigma_B, noise_BCHW, nothing, PRECONDITIONING
    ).mean()


def _collate(samples: Sequence[Sample]) -> tuple[list[str], Tensor]:
    images = torch.stack([sample.image for sample in samples])
    return [sample.key for sample in samples], images.float().div_(127.5).sub_(1)


def _step_of(path: Path) -> int:
    return int(path.name.partition("-")[2])


if __name__ == "__main__":
    main()
