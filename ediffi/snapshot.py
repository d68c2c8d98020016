"""Snapshots: EMA weights as safetensors beside a JSON record of what they are.

A directory with `model.safetensors` and `snapshot.json`. The record carries the sha256 of the
weights and is written last, so it exists exactly when the snapshot is complete. Everything after
training (experts, ensembles, sampling) starts from snapshots; resumable state is a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ediffi.network import NetworkConfig, build_network, network_from_json, network_to_json
from ediffi.noise import WHOLE, NoiseInterval, SigmaDistribution
from ediffi.preconditioning import Denoiser, Preconditioning

FORMAT = 1
RECORD_NAME = "snapshot.json"
WEIGHTS_NAME = "model.safetensors"


class SnapshotError(ValueError):
    """A snapshot or ensemble directory is incomplete, damaged or not what it says it is."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a set of weights is: enough to rebuild the denoiser and place it on the sigma axis."""

    network: NetworkConfig
    preconditioning: Preconditioning
    distribution: SigmaDistribution
    interval: NoiseInterval = WHOLE  # the slice it was trained on
    images_seen: int

    def __post_init__(self) -> None:
        """Raise ValueError if images_seen is negative."""
        if self.images_seen < 0:
            raise ValueError(f"images_seen must not be negative, got {self.images_seen}")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "network": network_to_json(self.network),
            "preconditioning": self.preconditioning.to_json(),
            "distribution": self.distribution.to_json(),
            "interval": self.interval.to_json(),
            "images_seen": self.images_seen,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`; missing fields raise KeyError."""
        return cls(
            network=network_from_json(record["network"]),
            preconditioning=Preconditioning.from_json(record["preconditioning"]),
            distribution=SigmaDistribution.from_json(record["distribution"]),
            interval=NoiseInterval.from_json(record["interval"]),
            images_seen=record["images_seen"],
        )


def save_snapshot(directory: Path, snapshot: Snapshot, state: Mapping[str, Tensor]) -> None:
    """Write weights, then their record; equal inputs give equal bytes.

    Args:
        directory: made if absent; a snapshot already there is replaced.
        snapshot: what the weights are.
        state: the network's state dict, `denoiser.network.state_dict()`.

    Raises:
        ValueError: `state` does not fit `snapshot.network`.
    """
    with torch.device("meta"):
        check_state(build_network(snapshot.network), state)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    directory.mkdir(parents=True, exist_ok=True)
    # A kill between the two writes must leave no record that vouches for other weights.
    (directory / RECORD_NAME).unlink(missing_ok=True)
    weights_path = directory / WEIGHTS_NAME
    publish(weights_path, lambda aside: save_file(tensors, aside))
    record = {"format": FORMAT, "sha256": file_sha256(weights_path), **snapshot.to_json()}
    publish_json(directory / RECORD_NAME, record)


def load_snapshot(directory: Path) -> tuple[Snapshot, Denoiser]:
    """Read a snapshot and its denoiser, on the CPU and in eval mode.

    Raises:
        SnapshotError: the directory is incomplete or damaged; the message names the file.
    """
    snapshot, sha256 = read_snapshot(directory)
    path = directory / WEIGHTS_NAME
    return snapshot, load_denoiser(path, sha256, snapshot.network, snapshot.preconditioning)


def read_snapshot(directory: Path) -> tuple[Snapshot, str]:
    """Read the record alone: the snapshot and the sha256 its weights must have."""
    record_path = directory / RECORD_NAME
    record = read_json(record_path, FORMAT)
    with errors_name(record_path):
        return Snapshot.from_json(record), record["sha256"]


def load_denoiser(
    weights_path: Path, sha256: str, network: NetworkConfig, preconditioning: Preconditioning
) -> Denoiser:
    """Build a denoiser from one weights file after checking the file's sha256.

    The global random state is left as it was.

    Raises:
        SnapshotError: the file is missing, has other bytes, or other tensors than the network.
    """
    verify_sha256(weights_path, sha256)
    with torch.device("meta"):  # random weights would cost time, and be overwritten
        built = build_network(network)
    try:
        state = load_file(weights_path)
        check_state(built, state)
    except (SafetensorError, ValueError) as error:
        raise SnapshotError(f"{weights_path}: {error}") from error
    # Copied, lest weights change with a file that is written over.
    own = {
        name: state[name].to(tensor.dtype, copy=True) for name, tensor in built.state_dict().items()
    }
    built.load_state_dict(own, assign=True)
    return Denoiser(built, preconditioning).eval()


def check_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless `state` has the network's tensors, by name and shape."""
    required = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if required == found:
        return
    differing = [
        f"{name}: required {required.get(name, 'absent')}, found {found.get(name, 'absent')}"
        for name in sorted(required.keys() | found.keys())
        if required.get(name) != found.get(name)
    ]
    more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    raise ValueError(
        f"the state dict does not fit the network config, {'; '.join(differing[:5])}{more}: "
        "use the state dict of the network itself, under the config it was trained with"
    )


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_sha256(path: Path, sha256: str) -> None:
    """Raise SnapshotError naming the file if it is missing or has another sha256."""
    if not path.is_file():
        raise SnapshotError(f"{path} is missing, although its record is there: fetch it again")
    found = file_sha256(path)
    if found != sha256:
        raise SnapshotError(
            f"{path} is damaged or was replaced: required sha256 {sha256}, found {found}; "
            "fetch or produce it again"
        )


def publish(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file aside, flush it to disk and rename it: `path` is never half written."""
    aside = path.with_name(path.name + ".part")
    write(aside)
    flush(aside)
    os.replace(aside, path)
    flush(path.parent)


def publish_json(path: Path, record: Mapping[str, Any]) -> None:
    """Publish `record` as indented JSON, keys in the order given."""
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    publish(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def flush(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path, known_format: int) -> dict[str, Any]:
    """Read a record of the given format number; SnapshotError if absent, no JSON or another."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SnapshotError(
            f"{path} is missing: it is written last, so the directory is incomplete or not what "
            "was expected; run the stage that writes it again"
        ) from None
    except ValueError as error:
        raise SnapshotError(f"{path} is not JSON: {error}") from error
    found = record.get("format") if isinstance(record, dict) else None
    if found != known_format:
        raise SnapshotError(f"{path}: required format {known_format}, found {found}")
    return record


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Turn errors of reading a record into SnapshotErrors that name its file."""
    try:
        yield
    except KeyError as error:
        raise SnapshotError(f"{path}: field {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise SnapshotError(f"{path}: {error}") from error
