"""The checkpoints of one training run: saving beside the training, keeping, finding the newest.

Training pauses while its state is copied to host memory. A thread writes the copy into
`.partial-<images>-<attempt>`, which is renamed and then marked complete when all ranks' files are
on the disk: a kill at any moment leaves nothing visible or a whole checkpoint.
"""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from ediffi.snapshot import flush
from ediffi.train.checkpoint_file import (
    MARKER,
    Checkpoint,
    CheckpointError,
    Marker,
    Progress,
    damage,
    open_checkpoint,
)
from ediffi.train.checkpoint_writer import BackgroundSave, HostCopy, Payload
from ediffi.train.engine import Worker
from ediffi.train.state import Fragment

__all__ = ["Checkpoint", "CheckpointError", "CheckpointStore", "Progress", "open_checkpoint"]

_log = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one training run, in a directory that all ranks share.

    Every method but `close` is called by all ranks together. Damaged checkpoints are passed over
    with a warning in the log of rank 0; the newest sound one counts.

    Args:
        directory: made if absent. Nobody else may write there.
        keep: so many of the newest stay.
        keep_every_images: besides, one in so many images stays; 0: none.
        worker: this process.
    """

    def __init__(
        self, directory: Path, *, keep: int, keep_every_images: int, worker: Worker
    ) -> None:
        self.directory = directory
        self._keep = keep
        self._keep_every_images = keep_every_images
        self._worker = worker
        self._host = HostCopy()
        self._saving: BackgroundSave | None = None
        self._damaged: set[Path] = set()
        # Attempts may overlap when a lost worker lives on: each writes into its own directory.
        self._attempt = self._share(uuid.uuid4().hex[:16])
        if worker.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            for leftover in directory.glob(".partial-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        dist.barrier()

    def save(self, fragments: Sequence[Fragment], payload: Payload, progress: Progress) -> None:
        """Copy this rank's tensors and return; a thread writes the checkpoint.

        Args:
            fragments: which pieces of which parameters the tensors are.
            payload: kind -> tensors aligned with `fragments`, 1-D, float32.
            progress: how far training is; rank 0's is written.

        Raises:
            CheckpointError: the save before this one failed, on any rank.
        """
        self.wait()
        pieces = self._host.take(fragments, payload)
        partial = self.directory / f".partial-{progress.images_seen}-{self._attempt}"
        self._saving = BackgroundSave(partial, pieces, progress, self._worker, self._publish)

    def wait(self) -> None:
        """Return when what was saved is complete.

        Raises:
            CheckpointError: it could not be written, on any rank.
        """
        error = self._join()
        failed = torch.tensor(int(error is not None), device=self._worker.device)
        dist.all_reduce(failed)
        if error is not None:
            raise error
        if failed.item():
            raise CheckpointError(
                f"another rank could not write its part of the checkpoint to {self.directory}: "
                "its log says why"
            )

    def close(self) -> None:
        """End this rank's thread; safe to call after other ranks have failed.

        Raises:
            CheckpointError: what it was writing is lost.
        """
        if self._saving is not None:
            self._saving.hurry()
        if (error := self._join()) is not None:
            raise error

    def load_newest(self) -> Checkpoint | None:
        """Find the newest sound checkpoint and verify every byte of it; None if there is none."""
        self.wait()
        name = self._share(self._newest() if self._worker.rank == 0 else "")
        return Checkpoint(self.directory / name) if name else None

    def _join(self) -> Exception | None:
        saving, self._saving = self._saving, None
        return saving.join() if saving is not None else None

    # -- rank 0 alone -----------------------------------------------------------------------------

    def _newest(self) -> str:
        for path in self._paths():
            if wrong := damage(path):
                _log.warning("checkpoint %s is passed over: %s", path, wrong)
                self._damaged.add(path)
            else:
                return path.name
        return ""

    def _publish(self, partial: Path, marker: Marker) -> None:
        """Make a written checkpoint visible, then retire old ones; in the writer's thread."""
        path = self.directory / f"images-{marker.progress.images_seen:010d}"
        # One is there if it was damaged, or an attempt that was given up is still alive. It keeps
        # its mark until the new one is complete: it may be the only one.
        aside = path.with_name(f"{path.name}-replaced-{self._attempt}")
        if path.exists():
            path.rename(aside)
        flush(partial)
        partial.rename(path)
        flush(self.directory)
        marker.publish(path)
        self._damaged.discard(path)
        if aside.exists():
            _delete(aside)
        self._retire()

    def _retire(self) -> None:
        """Delete what policy does not keep; what cannot be judged stays."""
        complete, worthless = {}, []
        for path in self._paths():
            try:
                marker = Marker.read(path)
            except FileNotFoundError:
                worthless.append(path)
            except (OSError, ValueError):
                continue  # perhaps of a later version
            else:
                complete[path] = marker.progress.images_seen
        sound = {path: images for path, images in complete.items() if path not in self._damaged}
        kept = kept_images(sound.values(), self._keep, self._keep_every_images)
        worthless += [path for path in complete if sound.get(path) not in kept]
        for path in worthless:
            _delete(path)

    def _paths(self) -> list[Path]:
        """Every directory that could be a checkpoint, newest first."""
        return sorted(self.directory.glob("images-*"), reverse=True)

    def _share(self, text: str) -> str:
        """Tell every rank what rank 0 says, in at most 255 bytes."""
        message = torch.zeros(256, dtype=torch.uint8)
        encoded = text.encode()
        message[: len(encoded) + 1] = torch.tensor([*encoded, 0], dtype=torch.uint8)
        message = message.to(self._worker.device)
        dist.broadcast(message, src=0)
        return bytes(message.tolist()).partition(b"\0")[0].decode()


def kept_images(images: Iterable[int], keep: int, keep_every_images: int) -> set[int]:
    """Which checkpoints stay, by images seen: the newest, and the first in each stretch.

    Args:
        images: of all sound checkpoints.
        keep: so many of the newest stay.
        keep_every_images: length of a stretch; the one before the first multiple does not count.
            0: there are none.
    """
    ascending = sorted(set(images))
    kept = set(ascending[-keep:])
    if keep_every_images:
        stretches: dict[int, int] = {}
        for count in ascending:
            stretches.setdefault(count // keep_every_images, count)
        kept |= {count for stretch, count in stretches.items() if stretch > 0}
    return kept


def _delete(path: Path) -> None:
    """Remove a checkpoint so that a half removed one does not look complete."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path)
