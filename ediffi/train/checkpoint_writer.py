"""Writing checkpoints beside the training: a copy in host memory, and a thread that stores it.

Every rank writes its own file; the ranks' threads speak through the file system, since collective
calls belong to the training thread. Rank 0 completes the checkpoint.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ediffi.snapshot import publish_json
from ediffi.train.checkpoint_file import (
    CheckpointError,
    Marker,
    Piece,
    Progress,
    write_pieces,
)
from ediffi.train.engine import Worker
from ediffi.train.state import Fragment

# Kind -> 1-D float32 tensors aligned with the fragments.
Payload = Mapping[str, Sequence[Tensor]]

_DEADLINE_S = 300.0  # for the slowest rank; below the time-outs of collective calls
_CLOSING_DEADLINE_S = 20.0  # the same when training has ended: others may have died
_POLL_S = 0.02


class HostCopy:
    """This rank's tensors in host memory: pinned if there is a GPU, allocated once."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, fragments: Sequence[Fragment], payload: Payload) -> list[Piece]:
        """Copy what `payload` holds now; the copy of before is overwritten."""
        num_elements = [fragment.num_elements for fragment in fragments]
        pieces = []
        for kind, tensors in payload.items():
            parts = self._buffer(kind, sum(num_elements)).split(num_elements)
            if num_elements:
                torch._foreach_copy_(list(parts), list(tensors), non_blocking=True)
            pieces += [
                Piece(kind, fragment.name, fragment.start, part)
                for fragment, part in zip(fragments, parts)
            ]
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return pieces

    def _buffer(self, kind: str, num_elements: int) -> Tensor:
        buffer = self._buffers.get(kind)
        if buffer is None or buffer.numel() != num_elements:
            pin = torch.cuda.is_available()
            buffer = torch.empty(num_elements, dtype=torch.float32, pin_memory=pin)
            self._buffers[kind] = buffer
        return buffer


class BackgroundSave:
    """One checkpoint being written by a thread of this rank.

    Args:
        partial: directory to write into, the same on all ranks; it may exist.
        pieces: this rank's part.
        progress: of the training.
        worker: this process.
        publish: called on rank 0, in the thread, with the marker when all files are there.
    """

    def __init__(
        self,
        partial: Path,
        pieces: Sequence[Piece],
        progress: Progress,
        worker: Worker,
        publish: Callable[[Path, Marker], None],
    ) -> None:
        self._partial = partial
        self._pieces = pieces
        self._progress = progress
        self._worker = worker
        self._publish = publish
        self._deadline_s = _DEADLINE_S
        self._error: Exception | None = None
        # A daemon: a process that has crashed must not linger for its checkpoint.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def join(self) -> Exception | None:
        """Wait until this rank's part is written, on rank 0 until all is published."""
        self._thread.join()
        return self._error

    def hurry(self) -> None:
        """Stop waiting for other ranks soon: training has ended."""
        self._deadline_s = _CLOSING_DEADLINE_S

    def _run(self) -> None:
        try:
            self._partial.mkdir(parents=True, exist_ok=True)
            name = f"rank-{self._worker.rank:05d}.safetensors"
            self._report({name: write_pieces(self._partial / name, self._pieces)})
            if self._worker.rank == 0:
                marker = Marker(
                    progress=self._progress,
                    world_size=self._worker.world_size,
                    files=self._collect(),
                )
                self._publish(self._partial, marker)
        except Exception as error:  # told by the training thread
            self._error = self._explain(error)
            self._withdraw()

    def _report(self, record: Mapping[str, str]) -> None:
        publish_json(self._report_path(self._worker.rank), record)

    def _report_path(self, rank: int) -> Path:
        return self._partial / f"rank-{rank:05d}.json"

    def _collect(self) -> dict[str, str]:
        """Wait for every rank's report, take the reports away, return all digests."""
        files: dict[str, str] = {}
        started_s = time.monotonic()
        for rank in range(self._worker.world_size):
            path = self._report_path(rank)
            while not path.exists():
                if time.monotonic() - started_s > self._deadline_s:
                    raise TimeoutError(f"rank {rank} has not written its part in time")
                time.sleep(_POLL_S)
            record = json.loads(path.read_text())
            if "error" in record:
                raise RuntimeError(f"rank {rank}: {record['error']}")
            files |= record
            path.unlink()
        return files

    def _explain(self, error: Exception) -> CheckpointError:
        told = CheckpointError(
            f"the checkpoint of {self._progress.images_seen} images could not be written to "
            f"{self._partial.parent}: {error}. Older checkpoints are as they were: make room or "
            "mend the disk, then run the same command again"
        )
        told.__cause__ = error
        return told

    def _withdraw(self) -> None:
        """Free what this rank has written, and let rank 0 know."""
        if self._worker.rank == 0:
            shutil.rmtree(self._partial, ignore_errors=True)
            return
        (self._partial / f"rank-{self._worker.rank:05d}.safetensors").unlink(missing_ok=True)
        try:
            assert self._error is not None
            self._report({"error": str(self._error.__cause__)})
        except OSError:
            pass  # rank 0 finds out by its deadline
