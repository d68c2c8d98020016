"""Checkpoints on the disk: the files, the marker that completes them, reading pieces back.

    images-0000012800/
        rank-00000.safetensors   what rank 0 kept for all: pieces of weights, moments and averages
        rank-00001.safetensors   …
        complete.json            written last: progress, and the sha256 of every file above

A tensor `<kind>/<parameter>` is a piece of that flattened parameter; the file's metadata says where
each begins. Nothing in it depends on the ZeRO stage or the number of ranks; see `state`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ediffi.snapshot import file_sha256, publish_json

FORMAT = 2
MARKER = "complete.json"
_STARTS = "starts"  # field of a file's metadata
_CHUNK_BYTES = 1 << 22  # written and hashed at a time
_MAX_VERIFYING_THREADS = 8


class CheckpointError(OSError):
    """A checkpoint could not be written, or the one asked for cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far training has come, and what it needs to go on alike."""

    images_seen: int = 0
    loss: float = math.nan  # mean over the last reported stretch
    num_steps: int = 0  # optimizer steps taken
    lr_factor: float = 1.0  # lowered after spikes, if the job says so
    num_spikes: int = 0  # steps refused
    norm_mean: float = 0.0  # running norm of the gradient; 0: none yet
    loss_sums: tuple[tuple[float, ...], ...] = ()  # by rank, since the last row; see `Meter.sums`

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values; losses, which may not be finite, as text."""
        sums = [[repr(loss) for loss in losses] for losses in self.loss_sums]
        return asdict(self) | {"loss": repr(self.loss), "loss_sums": sums}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`; unknown fields raise TypeError."""
        sums = tuple(tuple(map(float, losses)) for losses in record["loss_sums"])
        return cls(**{**record, "loss": float(record["loss"]), "loss_sums": sums})


@dataclass(frozen=True, kw_only=True)
class Marker:
    """Content of complete.json."""

    format: int = FORMAT
    progress: Progress
    world_size: int  # for people: any number of ranks can read it
    files: Mapping[str, str]  # name -> sha256

    def publish(self, path: Path) -> None:
        """Complete the checkpoint at `path`."""
        record = {
            "format": self.format,
            "progress": self.progress.to_json(),
            "world_size": self.world_size,
            "files": dict(self.files),
        }
        publish_json(path / MARKER, record)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the marker of the checkpoint at `path`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not one, or of another format.
        """
        record = json.loads((path / MARKER).read_text())
        found = record.get("format") if isinstance(record, dict) else None
        if found != FORMAT:
            raise ValueError(f"required format {FORMAT}, found {found}")
        try:
            return cls(**{**record, "progress": Progress.from_json(record["progress"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"fields are missing or unknown: {error}") from error


@dataclass(frozen=True)
class Piece:
    """Part of a flattened parameter in a file."""

    kind: str
    name: str  # of the parameter
    start: int
    data: Tensor  # float32, 1-D, on the CPU

    @property
    def key(self) -> str:
        """Name of the tensor in the file."""
        return f"{self.kind}/{self.name}"


def write_pieces(path: Path, pieces: Sequence[Piece]) -> str:
    """Write pieces as a safetensors file that is on the disk on return; return its sha256.

    safetensors' own writer would want the bytes once more for the digest.
    """
    header: dict[str, Any] = {
        "__metadata__": {_STARTS: json.dumps({piece.key: piece.start for piece in pieces})}
    }
    offset = 0
    for piece in pieces:
        end = offset + 4 * piece.data.numel()
        header[piece.key] = {
            "dtype": "F32",
            "shape": [piece.data.numel()],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data are aligned to 8 bytes
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for block in (struct.pack("<Q", len(text)), text):
            file.write(block)
            digest.update(block)
        for piece in pieces:
            data = piece.data.numpy().data.cast("B")
            for begin in range(0, len(data), _CHUNK_BYTES):
                chunk = data[begin : begin + _CHUNK_BYTES]
                file.write(chunk)
                digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def damage(path: Path) -> str:
    """Say what is wrong with the checkpoint at `path`; empty if it is sound. Reads all of it."""
    try:
        marker = Marker.read(path)
    except FileNotFoundError:
        return f"{MARKER} is missing"
    except (OSError, ValueError) as error:
        return f"{MARKER} cannot be read: {error}"
    with ThreadPoolExecutor(_MAX_VERIFYING_THREADS) as pool:
        found = pool.map(
            _file_damage, [path / name for name in marker.files], marker.files.values()
        )
        return "; ".join(filter(None, found))


def _file_damage(path: Path, sha256: str) -> str:
    try:
        found = file_sha256(path)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error}"
    return "" if found == sha256 else f"{path.name} is altered, or cut short"


class Checkpoint:
    """A complete checkpoint; pieces of any parameter are read when asked for.

    Args:
        path: its directory, known to be sound.
    """

    def __init__(self, path: Path) -> None:
        marker = Marker.read(path)
        self.path = path
        self.progress = marker.progress
        # (kind, parameter) -> where its pieces are: start, number of elements, file.
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any]]] = {}
        for file_name in marker.files:
            file = safe_open(path / file_name, framework="pt")
            for key, start in json.loads(file.metadata()[_STARTS]).items():
                kind, _, name = key.partition("/")
                (num_elements,) = file.get_slice(key).get_shape()
                self._pieces.setdefault((kind, name), []).append((start, num_elements, file))

    @property
    def kinds(self) -> frozenset[str]:
        """What is there of every parameter."""
        return frozenset(kind for kind, _ in self._pieces)

    def read(self, kind: str, name: str, start: int, num_elements: int) -> Tensor:
        """Elements [start, start + num_elements) of a flattened parameter, float32, on the CPU.

        Raises:
            ValueError: they are not all there.
        """
        found = torch.empty(num_elements, dtype=torch.float32)
        num_found = 0
        for piece_start, piece_elements, file in self._pieces.get((kind, name), ()):
            low = max(start, piece_start)
            high = min(start + num_elements, piece_start + piece_elements)
            if low < high:
                part = file.get_slice(f"{kind}/{name}")[low - piece_start : high - piece_start]
                found[low - start : high - start] = part
                num_found += high - low
        if num_found != num_elements:
            raise ValueError(
                f"checkpoint {self.path} must hold {kind} of {name} from element {start} to "
                f"{start + num_elements}, but has {num_found} of them; it has "
                f"{', '.join(sorted(self.kinds))}. It belongs to another network or other settings "
                "of the averages: train from the beginning in another directory"
            )
        return found


def open_checkpoint(path: Path) -> Checkpoint:
    """Verify and open a checkpoint that was published somewhere.

    Raises:
        CheckpointError: it is incomplete or damaged.
    """
    if wrong := damage(path):
        raise CheckpointError(f"checkpoint {path} is not sound: {wrong}. Make it again")
    try:
        return Checkpoint(path)
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path} is not of this kind: {error}") from error
