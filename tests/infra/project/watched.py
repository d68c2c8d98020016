"""A stage whose units say where they run and go on when they are told to, by files in a folder.

<control>/<unit>.<attempt>.json      where the attempt runs
<control>/<unit>.<attempt>.go        the attempt may go on to its end
<control>/<unit>.steps               what it has saved: every attempt goes on from there
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ray

from ediffi.train.stop import Stopped
from pipelines.stage import Outcome, Unit, Workspace

STEP_S = 0.2


@dataclass(frozen=True)
class Config:
    units: tuple[str, ...]
    control: str
    waits: bool = True  # False: the units end by themselves
    asks: bool = True  # False: they do not ask meanwhile whether to end


@dataclass(frozen=True)
class Watched:
    """Units that keep their state and save when they are told to end."""

    config: Config
    version: ClassVar[int] = 1
    gang: ClassVar[bool] = True

    def identity(self) -> Any:
        return {"units": list(self.config.units)}

    def plan(self, inputs: Mapping[str, Any]) -> list[Unit]:
        return [Unit(id=unit) for unit in self.config.units]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        control = Path(self.config.control)
        saved, name = control / f"{unit.id}.steps", f"{unit.id}.{workspace.attempt}"
        begun = int(saved.read_text()) if saved.exists() else 0
        where = {
            "pid": os.getpid(),
            "address": ray.util.get_node_ip_address(),
            "slurm_run": os.environ.get("SLURM_RESTART_COUNT", "0"),
            "scratch": str(workspace.scratch),
            "begun": begun,
        }
        with (control / f"{name}.json").open("a") as stream:
            stream.write(json.dumps(where) + "\n")
        steps = begun
        while self.config.waits and not (control / f"{name}.go").exists():
            time.sleep(STEP_S)
            steps += 1
            if self.config.asks and workspace.should_stop():
                saved.write_text(str(steps))
                raise Stopped(steps)
        (workspace.scratch / f"{unit.id}.txt").write_text(f"attempt {workspace.attempt}\n")
        return Outcome(files=[f"{unit.id}.txt"], num_in=1, num_out=1)
