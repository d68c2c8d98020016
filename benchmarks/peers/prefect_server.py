"""A Prefect server that stands, as a team has one; without it each flow starts its own."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from benchmarks.peers import PeerError
from benchmarks.peers.orchestrators import Orchestrator

_PATIENCE_S = 300.0


class PrefectServer:
    """Runs from `with` to its end; what `with` gives are the variables by which flows find it."""

    def __init__(self, side: Orchestrator, folder: Path) -> None:
        self._side, self._folder = side, folder

    def __enter__(self) -> Mapping[str, str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._folder.mkdir(parents=True)
        words = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        with (self._folder / "server.txt").open("wb") as said:
            self._process = subprocess.Popen(
                [str(self._side.python()), *words, "--no-ui"],
                env={**os.environ, **self._side.variables(self._folder)},
                stdout=said,
                stderr=subprocess.STDOUT,
            )
        address = f"http://127.0.0.1:{port}/api"
        try:
            self._wait(f"{address}/health")
        except BaseException:
            self._end()
            raise
        return {"PREFECT_API_URL": address}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def _wait(self, address: str) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                urllib.request.urlopen(address, timeout=5).close()
                return
            except (urllib.error.URLError, OSError) as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    tail = (self._folder / "server.txt").read_text(errors="replace")[-2000:]
                    raise PeerError(f"no Prefect server at {address}: {error}\n{tail}") from error
                time.sleep(0.2)

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
