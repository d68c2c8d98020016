"""Being asked to end: by SIGTERM to any rank, or by whoever launched the training."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from ediffi.train.engine import Worker


class Stopped(Exception):
    """Training ended early because it was asked to; a checkpoint of `images_seen` is complete."""

    def __init__(self, images_seen: int) -> None:
        super().__init__(
            f"stopped as asked after {images_seen} images; a checkpoint was saved, "
            "and the same command goes on from there"
        )
        self.images_seen = images_seen

    def __reduce__(self) -> tuple[type[Stopped], tuple[int]]:
        return Stopped, (self.images_seen,)


def never() -> bool:
    """Do not stop."""
    return False


class StopRequest:
    """Listens for the wish to end while the context is open.

    SIGTERM is caught where Python allows it, in the main thread of a process; elsewhere
    `should_stop` is the only way.

    Args:
        should_stop: asked after every batch, so it must be cheap.
        worker: this process.
    """

    def __init__(self, should_stop: Callable[[], bool], worker: Worker) -> None:
        self._should_stop = should_stop
        self._worker = worker
        self._is_signalled = False
        self._catches = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._catches:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._catches:
            signal.signal(signal.SIGTERM, self._before)

    def is_agreed(self) -> bool:
        """Whether any rank was asked to end; called by all ranks together."""
        asked = self._is_signalled or self._should_stop()
        if self._worker.world_size == 1:
            return asked
        import torch  # here: whoever launches the training knows `Stopped` without it
        import torch.distributed as dist

        message = torch.tensor([asked], dtype=torch.int32, device=self._worker.device)
        dist.all_reduce(message, dist.ReduceOp.MAX)
        return bool(message.item())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._is_signalled = True
