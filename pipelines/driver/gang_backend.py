"""What Ray Train does in every worker's main thread before training, besides joining torch's group.

Training runs in a thread of its own there, and Python hands signals to the main thread alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from ray.train.backend import Backend
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from pipelines.store.stopping import listen_for_sigterm


class _GangBackend(_TorchBackend):
    def on_start(self, worker_group, backend_config) -> None:  # type: ignore[no-untyped-def]
        super().on_start(worker_group, backend_config)
        worker_group.execute(listen_for_sigterm)


@dataclass
class GangConfig(TorchConfig):
    """Torch's process group, and ears for SIGTERM."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _GangBackend
