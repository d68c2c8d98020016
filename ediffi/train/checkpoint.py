"""Checkpoints: resumable training state, complete or ignored, never torn.

    images-0000012800/
        state/              DeepSpeed's own files, of all ranks
        ema.safetensors     whole averaged weights
        complete.json       written last: images seen, world size, sha256 of every file above

Everything is written into `.partial-<images>-<attempt>` first and renamed when it is on the disk.
"""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from ediffi.snapshot import file_sha256, publish_json
from ediffi.train.ema import EMA
from ediffi.train.engine import Worker, flush

_log = logging.getLogger(__name__)

_MARKER = "complete.json"
_TAG = "state"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far training has come."""

    images_seen: int = 0
    loss: float = float("nan")  # mean over the last reported stretch


@dataclass(frozen=True, kw_only=True)
class _Marker:
    """Content of complete.json."""

    format: int = 1
    images_seen: int
    loss: float
    world_size: int
    zero_stage: int
    files: dict[str, str]  # path below the checkpoint -> sha256


class CheckpointStore:
    """The checkpoints of one training run, in a directory that all ranks share.

    Every method is called by all ranks together. Damaged checkpoints are passed over with a
    warning in the log; the newest sound one counts.
    """

    def __init__(self, directory: Path, *, keep: int, worker: Worker) -> None:
        self.directory = directory
        self.keep = keep
        self.worker = worker
        # Attempts may overlap when a lost worker lives on: each writes into its own directory.
        self._attempt = f"{self._agree(uuid.uuid4().int >> 66):016x}"
        if worker.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            for leftover in directory.glob(".partial-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        dist.barrier()

    def save(self, engine: Any, ema: EMA, progress: Progress) -> None:
        """Write a checkpoint; leave only the `keep` newest complete ones."""
        partial = self.directory / f".partial-{progress.images_seen}-{self._attempt}"
        engine.save_checkpoint(str(partial), tag=_TAG, save_latest=False)
        average = ema.gather()
        if self.worker.rank == 0:
            save_file(average, partial / "ema.safetensors")
            flush(partial / "ema.safetensors")
            marker = _Marker(
                **asdict(progress),
                world_size=self.worker.world_size,
                zero_stage=engine.zero_optimization_stage(),
                files=_digests(partial),
            )
            self._publish(partial, marker)
            self._retire()
        dist.barrier()

    def load_newest(self, engine: Any, ema: EMA) -> Progress:
        """Restore the newest sound checkpoint; without one, change nothing and report 0 images.

        Raises:
            ValueError: it was written by another ZeRO stage or, from stage 1 on, by another
                number of ranks.
        """
        images_seen = self._agree(self._newest() if self.worker.rank == 0 else 0)
        if not images_seen:
            return Progress()
        path = self._path(images_seen)
        marker = _read_marker(path)
        self._check_layout(path, marker, engine.zero_optimization_stage())
        ema.load(load_file(path / "ema.safetensors"))
        engine.load_checkpoint(str(path), tag=_TAG)
        return Progress(images_seen=marker.images_seen, loss=marker.loss)

    def _publish(self, partial: Path, marker: _Marker) -> None:
        path = self._path(marker.images_seen)
        if path.exists():  # passed over as damaged, or cut off before its marker
            _delete(path)
        flush(partial)
        partial.rename(path)
        flush(self.directory)
        publish_json(path / _MARKER, asdict(marker))

    def _retire(self) -> None:
        complete = [path for path in self._paths() if (path / _MARKER).exists()]
        for path in set(self._paths()) - set(complete[: self.keep]):
            _delete(path)

    def _newest(self) -> int:
        """Images seen at the newest sound checkpoint; 0 if there is none."""
        for path in self._paths():
            if damage := _damage(path):
                _log.warning("checkpoint %s is passed over: %s", path, damage)
            else:
                return _read_marker(path).images_seen
        return 0

    def _paths(self) -> list[Path]:
        return sorted(self.directory.glob("images-*"), reverse=True)

    def _path(self, images_seen: int) -> Path:
        return self.directory / f"images-{images_seen:010d}"

    def _check_layout(self, path: Path, marker: _Marker, zero_stage: int) -> None:
        written = (marker.zero_stage, marker.world_size)
        if written == (zero_stage, self.worker.world_size) or written[0] == zero_stage == 0:
            return
        raise ValueError(
            f"{path} was written by {marker.world_size} ranks at zero_stage {marker.zero_stage} "
            f"and cannot be read by {self.worker.world_size} at zero_stage {zero_stage}: use the "
            f"former (zero_stage 0 may change its number of ranks), or delete {self.directory} "
            "to train from the beginning"
        )

    def _agree(self, value: int) -> int:
        """Tell every rank what rank 0 holds."""
        message = torch.tensor([value], dtype=torch.int64, device=self.worker.device)
        dist.broadcast(message, src=0)
        return int(message.item())


def _read_marker(path: Path) -> _Marker:
    marker = _Marker(**json.loads((path / _MARKER).read_text()))
    if marker.format != 1:
        raise ValueError(f"format {marker.format} of {_MARKER} is not 1")
    return marker


def _damage(path: Path) -> str:
    """Say what is wrong with a checkpoint; empty if it is sound."""
    try:
        marker = _read_marker(path)
        found = _digests(path)
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, TypeError, ValueError) as error:
        return f"{_MARKER} cannot be read: {error}"
    wrong = [name for name, digest in marker.files.items() if found.get(name) != digest]
    return f"missing or altered: {', '.join(wrong)}" if wrong else ""


def _digests(path: Path) -> dict[str, str]:
    digests = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and not file.name.startswith(_MARKER):
            digests[file.relative_to(path).as_posix()] = file_sha256(file)
    return digests


def _delete(path: Path) -> None:
    """Remove a checkpoint so that a half removed one does not look complete."""
    (path / _MARKER).unlink(missing_ok=True)
    shutil.rmtree(path)
