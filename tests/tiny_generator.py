"""An ensemble of random networks with real, tiny encoders: all that a generator needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from ediffi.cascade import save_cascade
from ediffi.conditioning import StreamConfig
from ediffi.encoders import load_encoder
from ediffi.encoding.encoder_weights import EncoderConfig
from ediffi.ensemble_file import save_ensemble
from ediffi.network import NetworkConfig
from ediffi.noise import WHOLE, NoiseInterval
from ediffi.preconditioning import Preconditioning
from ediffi.snapshot import Snapshot, save_snapshot
from tests.tiny_encoders import write_clip, write_t5
from tests.tiny_ensemble import (
    INTERVALS,
    PAPER,
    base_config,
    enlarging_config,
    random_denoiser,
)

WORDS = ("a", "red", "blue", "circle", "square", "and")
FAMILIES = {
    "t5": ("transformers", "t5"),
    "clip_text": ("open_clip_text", "clip"),
    "clip_image": ("open_clip_image", "clip"),
}


def write_generator(
    directory: Path, *, streams: tuple[str, ...] = ("t5",), sizes_px: tuple[int, ...] = ()
) -> Path:
    """Write an ensemble that draws 8 px, with the paper's intervals, and a cascade over it.

    Args:
        directory: of the ensemble.
        streams: some of t5, clip_text and clip_image.
        sizes_px: what the cascade enlarges to, each twice the size before; `sr16` makes 16 px.
    """
    if "t5" in streams:
        write_t5(directory / "encoders" / "t5", WORDS)
    if {"clip_text", "clip_image"} & set(streams):
        write_clip(directory / "encoders" / "clip")
    configs, descriptions = [], {}
    for name in streams:
        family, folder = FAMILIES[name]
        encoder = EncoderConfig(family=family, weights=f"./encoders/{folder}", max_tokens=16)
        descriptions[name] = asdict(encoder)
        weights = str(directory / "encoders" / folder)
        loaded = load_encoder(replace(encoder, weights=weights))
        configs.append(
            StreamConfig(
                name=name,
                token_width=loaded.token_width,
                pooled_width=loaded.pooled_width,
                pooled_as_token=family == "open_clip_image",
            )
        )
    sources = directory.with_name(f"{directory.name}-sources")
    heard = {"streams": tuple(configs), "cross_attention_px": (4,) if configs else ()}
    network = replace(base_config(), **heard)
    snapshots = _write_snapshots(sources / "base", {"base": WHOLE, **INTERVALS}, network)
    base = snapshots.pop("base")
    save_ensemble(directory, snapshots, base=base, encoders=descriptions)
    cascade = {}
    for image_px in sizes_px:
        heard["cross_attention_px"] = (image_px // 2,) if configs else ()
        name, network = f"sr{image_px}", enlarging_config(image_px, **heard)
        snapshots = _write_snapshots(sources / name, {"whole": WHOLE}, network)
        cascade[name] = sources / f"{name}-ensemble"
        save_ensemble(cascade[name], snapshots, base=None, encoders={})
    if cascade:
        save_cascade(directory, cascade)
    return directory


def _write_snapshots(
    root: Path, intervals: Mapping[str, NoiseInterval], network: NetworkConfig
) -> dict[str, Path]:
    """Write random snapshots that hear their conditioning well: it shows in the first pictures."""
    for seed, (name, interval) in enumerate(intervals.items()):
        snapshot = Snapshot(
            network=network,
            preconditioning=Preconditioning(),
            distribution=PAPER,
            interval=interval,
            images_seen=0,
        )
        state = random_denoiser(seed, network).network.state_dict()
        for weights in state:
            if "cross_attention" in weights or weights.startswith("streams."):
                state[weights] = 5 * state[weights]
        save_snapshot(root / name, snapshot, state)
    return {name: root / name for name in intervals}
