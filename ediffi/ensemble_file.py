"""An ensemble as a directory: `ensemble.json`, written last, and one weights file per expert.

`base.safetensors`, the experts' common ancestor, lies beside them if it was kept. The record says
which network they are, which noise interval each owns and which bytes each file must have.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch

from ediffi.ensemble import ROUTE, Blend, Ensemble
from ediffi.network import NetworkConfig, build_network, network_from_json, network_to_json
from ediffi.noise import NoiseInterval, SigmaDistribution, check_tiling
from ediffi.preconditioning import Denoiser, DenoiserFn, Preconditioning
from ediffi.residency import HOLD_ALL, OnDemand, Residency, Residents
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
Missing = Literal["error", "base"]
# What may name an expert, or a directory of a cascade: it becomes part of a path.
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

_BASE = "base"


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
        if not NAME_PATTERN.fullmatch(self.name):
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


def load_ensemble(
    directory: Path,
    *,
    device: str | torch.device = "cpu",
    residency: Residency = HOLD_ALL,
    missing: Missing = "error",
    blend: Blend = ROUTE,
) -> tuple[EnsembleInfo, Ensemble]:
    """Read an ensemble in eval mode.

    Args:
        directory: as `save_ensemble` wrote it.
        device: where the experts are called.
        residency: when their weights are read, and how many may lie on the device. An eager load
            checks every file of the directory, a lazy one each file when it is first needed.
        missing: `base`: an expert whose file is absent is stood in for by the base, with a warning;
            `Ensemble.stand_ins` names it. A damaged file is an error all the same.
        blend: how the experts' answers become one.

    Raises:
        SnapshotError: the directory is incomplete or damaged; the message names the file.
        ValueError: `missing` is no choice, or the budget holds not even one expert.
    """
    info = read_ensemble_info(directory)
    stand_ins = _absent(directory, info) if _may_stand_in(missing) else ()
    if stand_ins and info.base is None:
        raise SnapshotError(
            f"{directory} has no weights of {', '.join(stand_ins)} and no base model to stand in "
            "for them: fetch them again, or assemble it with its base"
        )
    if info.base and residency.load == "eager":
        verify_sha256(directory / info.base.weights, info.base.sha256)
    denoisers = _denoisers(directory, info, stand_ins, device, residency)
    if stand_ins:
        warnings.warn(
            f"{directory}: no weights of {', '.join(stand_ins)}; the base stands in. Pictures are "
            "not what the ensemble would draw",
            stacklevel=2,
        )
    experts = {record.name: (record.interval, denoisers[record.name]) for record in info.experts}
    return info, Ensemble(experts, blend=blend, stand_ins=stand_ins).eval()


def load_base(directory: Path) -> Denoiser:
    """Read the experts' common ancestor from an ensemble directory, on the CPU in eval mode.

    Raises:
        SnapshotError: the ensemble was assembled without its base, or is damaged.
    """
    info = read_ensemble_info(directory)
    if info.base is None:
        raise SnapshotError(f"{directory} has no base model: assemble it again with its base")
    return _load(directory, info, info.base)


def _may_stand_in(missing: Missing) -> bool:
    if missing not in get_args(Missing):
        choices = ", ".join(get_args(Missing))
        raise ValueError(f"missing must be one of {choices}, got {missing!r}")
    return missing == "base"


def _absent(directory: Path, info: EnsembleInfo) -> tuple[str, ...]:
    """Experts without a file of their own."""
    return tuple(r.name for r in info.experts if not (directory / r.weights).exists())


def _denoisers(
    directory: Path,
    info: EnsembleInfo,
    stand_ins: tuple[str, ...],
    device: str | torch.device,
    residency: Residency,
) -> dict[str, DenoiserFn]:
    """Expert name -> what answers for it; experts that share weights share the denoiser."""
    sources = {r.name: r for r in info.experts if r.name not in stand_ins}
    if info.base:
        sources |= dict.fromkeys(stand_ins, info.base)
    records = {record.name: record for record in sources.values()}
    readers = {
        name: partial(_load, directory, info, records[name])
        for name in sorted(records, key=lambda name: records[name].interval.sigma_min)
    }
    made: dict[str, DenoiserFn]
    if residency.holds_all:
        made = {name: read().to(device) for name, read in readers.items()}
    else:
        made = dict(_on_demand(readers, info, device, residency))
    return {name: made[record.name] for name, record in sources.items()}


def _on_demand(
    readers: Mapping[str, Callable[[], Denoiser]],
    info: EnsembleInfo,
    device: str | torch.device,
    residency: Residency,
) -> dict[str, OnDemand]:
    """Denoisers under one budget; eagerly, the most noisy come last and stay: they start."""
    with torch.device("meta"):
        weights = build_network(info.network).parameters()
    denoiser_bytes = sum(tensor.numel() * tensor.element_size() for tensor in weights)
    residents = Residents(device=device, residency=residency, denoiser_bytes=denoiser_bytes)
    denoisers = {name: OnDemand(name, read, residents) for name, read in readers.items()}
    if residency.load == "eager":
        for denoiser in denoisers.values():
            denoiser.bring()
    return denoisers


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
