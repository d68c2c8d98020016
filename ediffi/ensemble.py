"""The ensemble of expert denoisers: each network call goes to the expert that owns its sigma.

eDiff-I section 4. Routing is per call and per sample, never per step: the two calls of a Heun step
that straddles an edge go to two experts. On disk an ensemble is `ensemble.json`, written last, and
one safetensors file per expert, plus `base.safetensors` if the common ancestor is kept.

Shape legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ediffi.conditioning import Conditioning
from ediffi.network import NetworkConfig, network_from_json, network_to_json
from ediffi.noise import NoiseInterval, SigmaDistribution, check_tiling
from ediffi.preconditioning import Denoiser, Preconditioning
from ediffi.snapshot import (
    WEIGHTS_NAME,
    Snapshot,
    SnapshotError,
    errors_name,
    load_denoiser,
    publish,
    publish_json,
    read_json,
    read_snapshot,
    verify_sha256,
)

FORMAT = 1
RECORD_NAME = "ensemble.json"
_BASE = "base"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Ensemble(nn.Module):
    """A denoiser that sends every sample to the expert whose noise interval holds its sigma.

    Args:
        experts: name -> (interval, denoiser); the intervals must tile [0, inf).

    Attributes:
        names: experts from the least to the most noisy.
        intervals: interval of each expert, in that order.
        calls: num network calls per expert since construction or `reset_calls`.

    Raises:
        ValueError: the intervals leave a gap or overlap.
    """

    def __init__(self, experts: Mapping[str, tuple[NoiseInterval, Denoiser]]) -> None:
        super().__init__()
        check_tiling({name: interval for name, (interval, _) in experts.items()})
        ordered = sorted(experts.items(), key=lambda item: item[1][0].sigma_min)
        self.names = tuple(name for name, _ in ordered)
        self.intervals = tuple(interval for _, (interval, _) in ordered)
        self.experts = nn.ModuleList(denoiser for _, (_, denoiser) in ordered)
        # No buffer: it must stay float64 and on the CPU whatever becomes of the weights.
        self._edges = torch.tensor([i.sigma_max for i in self.intervals[:-1]], dtype=torch.float64)
        self.calls: Counter[str] = Counter()

    def forward(self, x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Estimate the clean images, float32; a batch within one interval is a single call.

        Raises:
            ValueError: a noise level is zero, negative or NaN.
        """
        index_B = self._route(sigma_B)
        used = index_B.unique().tolist()
        if len(used) == 1:
            return self._call(used[0], x_BCHW, sigma_B, conditioning)
        denoised_BCHW = torch.empty_like(x_BCHW, dtype=torch.float32)
        for expert_index in used:
            rows = (index_B == expert_index).nonzero().flatten().to(x_BCHW.device)
            denoised_BCHW[rows] = self._call(
                expert_index, x_BCHW[rows], sigma_B[rows], conditioning.select(rows)
            )
        return denoised_BCHW

    def reset_calls(self) -> None:
        """Start counting network calls from zero."""
        self.calls.clear()

    def _route(self, sigma_B: Tensor) -> Tensor:
        """Index of the expert of each sample, (B,) on the CPU: one wait for the device per call."""
        sigma_B = sigma_B.detach().to("cpu", torch.float64)
        if not (sigma_B > 0).all():
            raise ValueError(f"noise levels must be positive, got {sigma_B.tolist()}")
        return torch.bucketize(sigma_B, self._edges, right=True)  # right: an edge belongs above

    def _call(
        self, index: int, x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning
    ) -> Tensor:
        self.calls[self.names[index]] += 1
        denoised_BCHW: Tensor = self.experts[index](x_BCHW, sigma_B, conditioning)
        return denoised_BCHW


@dataclass(frozen=True, kw_only=True)
class WeightsRecord:
    """One weights file of an ensemble directory: an expert, or the base."""

    name: str
    interval: NoiseInterval
    weights: str  # file name inside the ensemble directory
    sha256: str
    images_seen: int

    def __post_init__(self) -> None:
        """Raise ValueError unless the name can safely name a file and the file is named by it."""
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"expert name {self.name!r} must consist of letters, digits, '_' and '-', "
                "because it names a file"
            )
        if self.weights != f"{self.name}.safetensors":
            raise ValueError(
                f"weights of {self.name!r} must be '{self.name}.safetensors', got {self.weights!r}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "name": self.name,
            "interval": self.interval.to_json(),
            "weights": self.weights,
            "sha256": self.sha256,
            "images_seen": self.images_seen,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`; unknown or missing fields raise."""
        return cls(**{**record, "interval": NoiseInterval.from_json(record["interval"])})


@dataclass(frozen=True, kw_only=True)
class EnsembleInfo:
    """Everything `ensemble.json` says."""

    experts: tuple[WeightsRecord, ...]  # from the least to the most noisy
    network: NetworkConfig
    preconditioning: Preconditioning
    distribution: SigmaDistribution
    encoders: Mapping[str, Any]  # stream name -> what produced its embeddings, free-form JSON
    base: WeightsRecord | None  # the experts' common ancestor; None when assembled without it

    def __post_init__(self) -> None:
        """Raise ValueError unless the names are distinct and the intervals tile [0, inf)."""
        names = Counter(record.name for record in self.records)
        if repeated := [name for name, num in names.items() if num > 1]:
            raise ValueError(f"names of experts must be distinct, got {repeated} more than once")
        check_tiling({record.name: record.interval for record in self.experts})

    @property
    def records(self) -> tuple[WeightsRecord, ...]:
        """The weights files of the directory: the experts, and the base if there is one."""
        return (*self.experts, self.base) if self.base else self.experts

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values; `base` only when there is one."""
        record = {
            "experts": [expert.to_json() for expert in self.experts],
            "network": network_to_json(self.network),
            "preconditioning": self.preconditioning.to_json(),
            "distribution": self.distribution.to_json(),
            "encoders": dict(self.encoders),
        }
        return {**record, "base": self.base.to_json()} if self.base else record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`; missing fields raise KeyError."""
        return cls(
            experts=tuple(WeightsRecord.from_json(expert) for expert in record["experts"]),
            network=network_from_json(record["network"]),
            preconditioning=Preconditioning.from_json(record["preconditioning"]),
            distribution=SigmaDistribution.from_json(record["distribution"]),
            encoders=record["encoders"],
            base=WeightsRecord.from_json(record["base"]) if "base" in record else None,
        )


def save_ensemble(
    directory: Path,
    experts: Mapping[str, Path],
    *,
    base: Path | None,
    encoders: Mapping[str, Any],
) -> None:
    """Assemble snapshots into one directory that needs nothing else.

    Args:
        directory: made if absent; an ensemble already there is replaced.
        experts: name -> snapshot directory. The names become file names; "base" is taken.
        base: snapshot directory of the common ancestor, or None to leave it out.
        encoders: stream name -> description of its encoder; any JSON.

    Raises:
        ValueError: intervals that do not tile, snapshots of different networks, names that cannot
            be used, or a damaged snapshot (SnapshotError). Nothing is written then.
    """
    if _BASE in experts:
        raise ValueError(f"no expert may be named {_BASE!r}: it names the common ancestor")
    sources = {**experts, **({_BASE: base} if base else {})}
    info = _describe({name: read_snapshot(source) for name, source in sources.items()}, encoders)
    for record in info.records:
        verify_sha256(sources[record.name] / WEIGHTS_NAME, record.sha256)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RECORD_NAME).unlink(missing_ok=True)
    for record in info.records:
        copy_here = partial(shutil.copyfile, sources[record.name] / WEIGHTS_NAME)
        publish(directory / record.weights, copy_here)
    publish_json(directory / RECORD_NAME, {"format": FORMAT, **info.to_json()})


def read_ensemble_info(directory: Path) -> EnsembleInfo:
    """Read `ensemble.json` alone; SnapshotError if it is absent or damaged."""
    record_path = directory / RECORD_NAME
    record = read_json(record_path, FORMAT)
    with errors_name(record_path):
        return EnsembleInfo.from_json(record)


def load_ensemble(directory: Path) -> tuple[EnsembleInfo, Ensemble]:
    """Read an ensemble on the CPU in eval mode, checking every file of the directory.

    Raises:
        SnapshotError: the directory is incomplete or damaged; the message names the file.
    """
    info = read_ensemble_info(directory)
    if info.base:
        verify_sha256(directory / info.base.weights, info.base.sha256)
    experts = {
        record.name: (record.interval, _load(directory, info, record)) for record in info.experts
    }
    return info, Ensemble(experts).eval()


def load_base(directory: Path) -> Denoiser:
    """Read the experts' common ancestor from an ensemble directory, on the CPU in eval mode.

    Raises:
        SnapshotError: the ensemble was assembled without its base, or is damaged.
    """
    info = read_ensemble_info(directory)
    if info.base is None:
        raise SnapshotError(f"{directory} has no base model: assemble it again with its base")
    return _load(directory, info, info.base)


def _load(directory: Path, info: EnsembleInfo, record: WeightsRecord) -> Denoiser:
    path = directory / record.weights
    return load_denoiser(path, record.sha256, info.network, info.preconditioning)


def _describe(
    snapshots: Mapping[str, tuple[Snapshot, str]], encoders: Mapping[str, Any]
) -> EnsembleInfo:
    """Build the record of an ensemble from its snapshots and the sha256 of their weights."""
    records = {
        name: WeightsRecord(
            name=name,
            interval=snapshot.interval,
            weights=f"{name}.safetensors",
            sha256=sha256,
            images_seen=snapshot.images_seen,
        )
        for name, (snapshot, sha256) in snapshots.items()
    }
    base = records.pop(_BASE, None)
    check_tiling({name: record.interval for name, record in records.items()})
    _check_alike({name: snapshot for name, (snapshot, _) in snapshots.items()})
    shared = next(snapshot for snapshot, _ in snapshots.values())
    return EnsembleInfo(
        experts=tuple(sorted(records.values(), key=lambda record: record.interval.sigma_min)),
        network=shared.network,
        preconditioning=shared.preconditioning,
        distribution=shared.distribution,
        encoders=encoders,
        base=base,
    )


def _check_alike(snapshots: Mapping[str, Snapshot]) -> None:
    """Raise ValueError unless all snapshots share network, preconditioning and distribution."""
    (first_name, first), *others = snapshots.items()
    for name, snapshot in others:
        for field in ("network", "preconditioning", "distribution"):
            required, found = getattr(first, field), getattr(snapshot, field)
            if required != found:
                raise ValueError(
                    f"{first_name!r} and {name!r} must have the same {field}, got {required} and "
                    f"{found}: train them from one base"
                )
