"""img2dataset in a process of its own: `python fetch_process.py PARENT_PID < arguments.json`.

Its public `download` does the work, with three parts put aside. Imports that only other modes need
(torch, ray, wandb, albumentations) take seconds and call home: they are absent or empty here. Its
pool and logger would be two more processes, which import everything again, outlive a killed
parent, and turn a failed shard into exit code 0: here the one shard is fetched in this process,
and its exception ends it. And it opens whatever address it is given and reads whatever comes back:
here connections are guarded and responses bounded.

This file imports nothing of ours by name, so that it runs whatever the working directory.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
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


def _neighbour(name: str) -> Any:
    """A module that lies beside this file, loaded without its package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def _guard(arguments: dict[str, Any]) -> None:
    guards, http = _neighbour("address_guard"), _neighbour("guarded_http")
    guard = guards.AddressGuard(guards.AddressRules.parse(arguments["allow_addresses"]))
    guard.install()
    http.install(guard, http.Limits(max_bytes=arguments["max_bytes"], max_s=arguments["max_s"]))


def main() -> None:
    """Run `img2dataset.download` with the arguments that stdin holds as JSON.

    They are `download`, its keyword arguments, and `allow_addresses`, `max_bytes` and `max_s`.
    """
    _die_with(int(sys.argv[1]))
    arguments = json.load(sys.stdin)
    absent: dict[str, Any] = {"torch": None, "ray": None}
    sys.modules.update(absent)  # both imports are optional there
    sys.modules.update({name: ModuleType(name) for name in ("wandb", "albumentations")})
    library: Any = importlib.import_module("img2dataset.main")
    library.LoggerProcess = _NoLogger
    library.multiprocessing_distributor = _fetch_here
    _guard(arguments)
    library.download(**arguments["download"])


if __name__ == "__main__":
    main()
