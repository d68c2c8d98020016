"""A recipe of one stage whose units a test can watch, hold up and let go: project/watched.py."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("project")
DEADLINE_S = 200  # several Rays start on one machine


@dataclass(frozen=True)
class WatchedProject:
    """A directory with recipe, module and store."""

    path: Path

    @classmethod
    def make(cls, path: Path) -> WatchedProject:
        shutil.copytree(SOURCE, path)
        (path / "control").mkdir()
        return cls(path)

    @property
    def command(self) -> tuple[str, ...]:
        """The run, as a user would start it in the project's directory."""
        control = f"custom_stages.watched.config.control={self.path / 'control'}"
        run = ("run", "recipe.yaml", "watched", "--store", "store", "--set", control)
        return (sys.executable, "-m", "pipelines.cli", *run)

    @property
    def environment(self) -> dict[str, str]:
        """What the run needs of its environment, on every node."""
        variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return {
            **variables,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        }

    def begun(self, unit: str, attempt: int = 1) -> list[Any]:
        """Where an attempt at a unit has begun, in each run; a further run begins anew at 1."""
        path = self.path / "control" / f"{unit}.{attempt}.json"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def let_go(self, unit: str, attempt: int = 1) -> None:
        """Let an attempt at a unit go on to its end, now or once it has begun."""
        (self.path / "control" / f"{unit}.{attempt}.go").touch()

    def receipt(self, unit: str) -> Any:
        """The unit's receipt; None while it is not done."""
        for path in self.path.glob(f"store/watched/*/receipts/{unit}.json"):
            return json.loads(path.read_text())
        return None

    def published(self, unit: str) -> str:
        """What the unit's published file says; empty while there is none."""
        for path in self.path.glob(f"store/watched/*/{unit}.txt"):
            return path.read_text()
        return ""

    @property
    def is_finished(self) -> bool:
        return any(self.path.glob("store/watched/*/manifest.json"))


def wait_until(
    moment: str,
    has_come: Callable[[], object],
    *logs: Path,
    deadline_s: float = DEADLINE_S,
) -> None:
    """Wait for a moment; if it does not come, show the end of the logs."""
    deadline = time.monotonic() + deadline_s
    while not has_come():
        if time.monotonic() > deadline:
            said = "\n".join(f"{one}:\n{one.read_text()[-4000:]}" for one in logs if one.exists())
            raise AssertionError(f"{moment}: not in {deadline_s:g} s\n{said}")
        time.sleep(0.1)
