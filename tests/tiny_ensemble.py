"""Random networks of a few thousand weights, as snapshots and ensembles, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ediffi.conditioning import Conditioning, Stream, StreamConfig
from ediffi.efficient_unet import EfficientUNetConfig
from ediffi.ensemble_file import save_ensemble
from ediffi.network import NetworkConfig, build_network
from ediffi.noise import WHOLE, NoiseInterval, SigmaDistribution, paper_intervals
from ediffi.preconditioning import Denoiser, Preconditioning
from ediffi.snapshot import Snapshot, save_snapshot

PAPER = SigmaDistribution()
INTERVALS = paper_intervals(PAPER)
STREAMS = (StreamConfig(name="t5", token_width=6),)
ENCODERS = {"t5": {"family": "transformers", "weights_identity": {"sha256": "ab"}}}


def base_config() -> NetworkConfig:
    """A U-Net of 8 px."""
    from ediffi.unet import UNetConfig

    return UNetConfig(
        image_px=8,
        widths=(8, 8),
        num_blocks=1,
        cross_attention_px=(4,),
        head_width=8,
        context_width=8,
        embedding_width=16,
        streams=STREAMS,
    )


def enlarging_config(image_px: int, **changes: object) -> EfficientUNetConfig:
    """An Efficient U-Net that doubles the side of pictures, with attention to text."""
    fields = {
        "image_px": image_px,
        "low_res_factor": 2,
        "widths": (8,),
        "num_blocks": (1,),
        "cross_attention_px": (image_px // 2,),
        "head_width": 8,
        "context_width": 8,
        "embedding_width": 16,
        "streams": STREAMS,
    }
    return EfficientUNetConfig(**{**fields, **changes})


def random_denoiser(seed: int, config: NetworkConfig | None = None) -> Denoiser:
    """A small network with weights drawn afresh, since a new one answers zero."""
    network, generator = build_network(config or base_config()), torch.Generator()
    generator.manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return Denoiser(network, Preconditioning()).eval()


def text(batch_size: int) -> Conditioning:
    """Random tokens for these networks."""
    tokens_BTD = torch.randn(batch_size, 5, 6, generator=torch.Generator().manual_seed(2))
    mask_BT = torch.ones(batch_size, 5, dtype=torch.bool)
    return Conditioning({"t5": Stream(tokens_BTD=tokens_BTD, mask_BT=mask_BT)}, batch_size)


def write_snapshots(
    root: Path, intervals: Mapping[str, NoiseInterval], config: NetworkConfig | None = None
) -> dict[str, Path]:
    """Write a snapshot for each name, each with weights of its own."""
    config = config or base_config()
    for seed, (name, interval) in enumerate(intervals.items()):
        snapshot = Snapshot(
            network=config,
            preconditioning=Preconditioning(),
            distribution=PAPER,
            interval=interval,
            images_seen=1000 + seed,
        )
        save_snapshot(root / name, snapshot, random_denoiser(seed, config).network.state_dict())
    return {name: root / name for name in intervals}


def write_ensemble(directory: Path, config: NetworkConfig | None = None) -> Path:
    """Write an ensemble of the paper's three experts and their base."""
    snapshots = write_snapshots(
        directory.with_name(directory.name + "-snapshots"), {"base": WHOLE, **INTERVALS}, config
    )
    base = snapshots.pop("base")
    save_ensemble(directory, snapshots, base=base, encoders=ENCODERS)
    return directory
