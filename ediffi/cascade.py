"""A cascade: the base's pictures, enlarged by one super-resolution ensemble after another.

eDiff-I draws at 64 px and enlarges to 256 and to 1024 px (paper section 4). On disk it is the
base's ensemble directory with `cascade.json`, written last, that names directories inside it, in
order of size. Each of them is an ensemble of Efficient U-Nets, with as many experts as it likes.

Shape legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ediffi.conditioning import Conditioning
from ediffi.efficient_unet import EfficientUNetConfig
from ediffi.ensemble_file import NAME_PATTERN, EnsembleInfo, read_ensemble_info
from ediffi.ensemble_file import RECORD_NAME as ENSEMBLE_RECORD_NAME
from ediffi.network import NetworkConfig
from ediffi.preconditioning import DenoiserFn
from ediffi.sampling import SamplingConfig, draw
from ediffi.snapshot import SnapshotError, publish, publish_json, read_json, verify_sha256

FORMAT = 1
RECORD_NAME = "cascade.json"
FOLDER = "super_resolution"

# The paper's table 7: DEIS, "order 3", 10 steps. Its guidance is unknown; this is our default's.
PAPER_ENLARGING = SamplingConfig(sampler="deis", rho=3.0, num_steps=10)


def save_cascade(directory: Path, ensembles: Mapping[str, Path]) -> None:
    """Make the ensemble in `directory` the base of a cascade, with copies of its other ensembles.

    Args:
        directory: the base's ensemble, already there; a cascade there is replaced.
        ensembles: name -> ensemble directory, the first to enlarge the base's pictures first. Their
            weights go to `super_resolution/<name>`, and stay where they are if they lie there.

    Raises:
        ValueError: none are given, a name that cannot name a directory, sizes that do not chain,
            streams that are not the base's, or a damaged ensemble (SnapshotError). Nothing is
            written then.
    """
    if not ensembles:
        raise ValueError("a cascade needs at least one super-resolution ensemble, got none")
    for name in ensembles:
        if not NAME_PATTERN.fullmatch(name):
            raise ValueError(
                f"name {name!r} must consist of letters, digits, '_' and '-', because it names a "
                "directory"
            )
    infos = {name: read_ensemble_info(source) for name, source in ensembles.items()}
    _check(read_ensemble_info(directory), infos)
    for name, info in infos.items():
        for record in info.records:
            verify_sha256(ensembles[name] / record.weights, record.sha256)
    (directory / RECORD_NAME).unlink(missing_ok=True)
    for name, info in infos.items():
        _copy_ensemble(ensembles[name], directory / FOLDER / name, info)
    paths = [f"{FOLDER}/{name}" for name in ensembles]
    publish_json(directory / RECORD_NAME, {"format": FORMAT, "super_resolution": paths})


def read_cascade(directory: Path) -> tuple[Path, ...]:
    """Directories of the ensembles that enlarge, in order; () if the ensemble stands alone.

    Records are read and checked, weights are not.

    Raises:
        SnapshotError: a record is missing or damaged, leads out of `directory`, or names ensembles
            that do not fit one another.
    """
    record_path = directory / RECORD_NAME
    if not record_path.exists():
        return ()
    paths = _inside(directory, read_json(record_path, FORMAT))
    infos = {str(path.relative_to(directory)): read_ensemble_info(path) for path in paths}
    base = read_ensemble_info(directory)
    try:
        _check(base, infos)
    except ValueError as error:
        raise SnapshotError(f"{record_path}: {error}") from error
    return paths


def picture_sizes_px(base: NetworkConfig, enlarging: Mapping[str, NetworkConfig]) -> dict[str, int]:
    """Side of the pictures that each network of a cascade draws, by name, in order.

    A network that was trained on whole pictures enlarges to the size it was trained at. One without
    self-attention may have been trained on patches; it enlarges what it is given.

    Raises:
        ValueError: a network does not enlarge, or not pictures of the size that come before it.
    """
    sizes_px: dict[str, int] = {}
    side_px = base.image_px
    for name, network in enlarging.items():
        if not isinstance(network, EfficientUNetConfig):
            raise ValueError(f"{name} must be a super-resolution network, got {network}")
        if network.image_channels != base.image_channels:
            raise ValueError(
                f"{name} must draw {base.image_channels} channels as the base does, got "
                f"{network.image_channels}"
            )
        enlarged_px = side_px * network.low_res_factor
        on_patches = network.image_px < enlarged_px and not network.self_attention_px
        if not (network.image_px == enlarged_px or on_patches) or enlarged_px % network.stride:
            raise ValueError(
                f"{name} enlarges {network.low_res_px} px to {network.image_px} px in steps of "
                f"{network.stride} px, but is given pictures of {side_px} px: put the networks in "
                "order of size, each trained at the size that the one before it draws"
            )
        sizes_px[name] = side_px = enlarged_px
    return sizes_px


def enlarge(
    denoiser: DenoiserFn,
    network_config: NetworkConfig,
    low_res_BCHW: Tensor,
    conditioning: Conditioning,
    *,
    seeds: Sequence[int],
    stage: int,
    config: SamplingConfig = PAPER_ENLARGING,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Draw large pictures of small ones.

    Args:
        denoiser: of the whole noise axis, in eval mode, on `device`; not guided yet.
        network_config: its network's.
        low_res_BCHW: float in [-1, 1]; what lies outside is clipped, as training never showed it.
        conditioning: one entry a picture; what the base was given, too.
        seeds: one a picture, the base's own.
        stage: 1 for the first network after the base, and so on: other noise for the same seed.
        config: how; guidance drops the streams and never the small picture.
        device: where to draw.

    Returns:
        float32 (B, C, H, W) on `device`, nominally in [-1, 1], not clipped.

    Raises:
        ValueError: the network does not enlarge, the small pictures do not fit it, or numbers of
            pictures, seeds and conditionings differ.
    """
    if not isinstance(network_config, EfficientUNetConfig):
        raise ValueError(f"only a super-resolution network can enlarge, got {network_config}")
    if stage < 1:
        raise ValueError(f"stage must be at least 1, as the base's is 0, got {stage}")
    channels, *low_res_sides = low_res_BCHW.shape[1:]
    if channels != network_config.image_channels:
        raise ValueError(
            f"low_res_BCHW must have {network_config.image_channels} channels, got {channels}"
        )
    sides = [network_config.low_res_factor * side for side in low_res_sides]
    small = low_res_BCHW.detach().float().clamp(-1, 1)
    return draw(
        denoiser,
        replace(conditioning, low_res_BCHW=small),
        seeds=seeds,
        shape_CHW=(channels, sides[0], sides[1]),
        config=config,
        device=device,
        stage=stage,
    )


def _check(base: EnsembleInfo, infos: Mapping[str, EnsembleInfo]) -> None:
    """Raise ValueError unless sizes chain and streams and encoders are the base's."""
    picture_sizes_px(base.network, {name: info.network for name, info in infos.items()})
    base_streams = {stream.name: stream for stream in base.network.streams}
    for name, info in infos.items():
        for stream in info.network.streams:
            own = base_streams.get(stream.name)
            required = (own.token_width, own.pooled_width) if own else "no such stream"
            found = (stream.token_width, stream.pooled_width)
            if required != found:
                raise ValueError(
                    f"stream {stream.name} of {name} must be the base's, with the same widths of "
                    f"tokens and pooled vector: the base has {required}, {name} has {found}"
                )
        for stream_name in sorted(info.encoders.keys() & base.encoders.keys()):
            if info.encoders[stream_name] != base.encoders[stream_name]:
                raise ValueError(
                    f"encoder {stream_name} of {name} must be the base's, "
                    f"{base.encoders[stream_name]}; got {info.encoders[stream_name]}"
                )


def _inside(directory: Path, record: Mapping[str, Any]) -> tuple[Path, ...]:
    """The directories that a cascade's record names, none of them outside `directory`."""
    names = record.get("super_resolution")
    if not isinstance(names, list) or not names:
        raise SnapshotError(
            f"{directory / RECORD_NAME}: super_resolution must be a list of directories, "
            f"got {names!r}"
        )
    root = directory.resolve()
    for name in names:
        parts = PurePosixPath(name).parts if isinstance(name, str) else ()
        plain = bool(parts) and all(NAME_PATTERN.fullmatch(part) for part in parts)
        if not plain or not (root / name).resolve().is_relative_to(root):
            raise SnapshotError(
                f"{directory / RECORD_NAME}: super_resolution must name directories inside "
                f"{directory}, got {name!r}"
            )
    if len(set(names)) < len(names):
        raise SnapshotError(
            f"{directory / RECORD_NAME}: super_resolution must name each directory once, "
            f"got {names}"
        )
    return tuple(directory / name for name in names)


def _copy_ensemble(source: Path, target: Path, info: EnsembleInfo) -> None:
    """Copy a checked ensemble, its record last; nothing to do if it is there already."""
    if source.resolve() == target.resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    (target / ENSEMBLE_RECORD_NAME).unlink(missing_ok=True)
    for name in (*(record.weights for record in info.records), ENSEMBLE_RECORD_NAME):
        publish(target / name, partial(shutil.copyfile, source / name))
