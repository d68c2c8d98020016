"""img2dataset in a process of its own: `python fetch_process.py PARENT_PID < arguments.json`.

Its public `download` does the work, with two parts put aside. Imports that only other modes need
(torch, ray, wandb, albumentations) take seconds and call home: they are absent or empty here. And
its pool and logger would be two more processes, which import everything again, outlive a killed
parent, and turn a failed shard into exit code 0: here the one shard is fetched in this process,
and its exception ends it.

This file imports nothing of ours, so that it runs whatever the working directory.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


class _NoLogger:
    """Stands in for img2dataset's logger process."""

    def __init__(self, *_: object) -> None:
        self.done_shards: set[int] = set()

    def start(self) -> None:
        """Start nothing."""

    def join(self) -> None:
        """Wait for nothing."""


def _fetch_here(_processes: int, downloader: Any, shards: Iterable[Any], *_: object) -> None:
    """Stands in for img2dataset's process pool."""
    for shard in shards:
        downloader.download_shard(shard)


def _die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies, also if it has died already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit(f"parent process {parent_pid} is gone")


def main() -> None:
    """Run `img2dataset.download` with the keyword arguments that stdin holds as JSON."""
    _die_with(int(sys.argv[1]))
    absent: dict[str, Any] = {"torch": None, "ray": None}
    sys.modules.update(absent)  # both imports are optional there
    sys.modules.update({name: ModuleType(name) for name in ("wandb", "albumentations")})
    library: Any = importlib.import_module("img2dataset.main")
    library.LoggerProcess = _NoLogger
    library.multiprocessing_distributor = _fetch_here
    library.download(**json.load(sys.stdin))


if __name__ == "__main__":
    main()
