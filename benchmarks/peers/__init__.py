"""The other sides of the benchmarks: each in an environment and a process of its own.

A peer is a small script `benchmarks/peers/<name>.py` that reads one JSON request a line and answers
with one JSON line (`serve`). It runs under the interpreter of `.bench/<environment>`, which has
the peer at a pinned version and sees our own environment behind it: torch, numpy and pillow are
the same files on both sides, so a ratio compares the readers and nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".bench"
_MARK = "requirements.txt"  # written last: the environment is complete


class PeerError(RuntimeError):
    """A peer could not be installed, or it failed."""


def environment(name: str, requirements: Sequence[str], *, alone: bool = False) -> Path:
    """The interpreter of `.bench/<name>` with `requirements`, made if it is not there yet.

    Args:
        name: of the folder.
        requirements: pinned, `package==version`; what they need besides is taken from our own
            environment where that satisfies them.
        alone: nothing of our environment is seen. For peers whose start is timed: many look
            through every installed package when they are imported.

    Raises:
        PeerError: pip failed.
    """
    folder = ENVIRONMENTS / name
    python = folder / "bin" / "python"
    wanted = "\n".join(sorted(requirements)) + "\n"
    mark = folder / _MARK
    if mark.exists() and mark.read_text() == wanted:
        return python
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    if not alone:
        ours = sysconfig.get_paths()["purelib"]
        (theirs,) = folder.glob("lib/python*/site-packages")
        (theirs / "ours.pth").write_text(f"{ours}\n")  # behind their own packages
    _run([str(python), "-m", "pip", "install", "--quiet", *requirements])
    mark.write_text(wanted)
    return python


def version_of(python: Path, package: str) -> str:
    """The version of a package as that interpreter sees it."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return _run([str(python), "-c", code]).strip()


class Peer:
    """A peer's process, from `with` to its end; idle while it is not asked.

    Args:
        module: of its script, such as `benchmarks.peers.streaming_read`.
        python: its interpreter.
    """

    def __init__(self, module: str, python: Path) -> None:
        self.module = module
        self.python = python

    def __enter__(self) -> Peer:
        self._process = subprocess.Popen(
            [str(self.python), "-m", self.module],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request, and wait for its answer.

        Raises:
            PeerError: the peer died or failed; what it said is on stderr.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None, "opened by __enter__"
        assert stdout is not None
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise PeerError(f"{self.module} ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(handle: Callable[..., dict[str, Any]]) -> None:
    """The peer's side: call `handle(**request)` for every line of stdin, answer on stdout.

    Whatever else a peer prints goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(handle(**json.loads(line))), file=answers, flush=True)


def _run(command: Sequence[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise PeerError(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    return result.stdout
