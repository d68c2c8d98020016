"""The second step of the stale-cache toy as a custom stage."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from helping import helper  # type: ignore[import-not-found]
from toy import note  # type: ignore[import-not-found]  # beside the recipe too

from pipelines.stage import Manifest, Outcome, Unit, Workspace


@dataclass(frozen=True)
class Config:
    add: int


@dataclass(frozen=True, kw_only=True)
class Helped:
    """What the helper makes of the number, and something added."""

    config: Config
    version: ClassVar[int] = 1

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        return [Unit(id="number")]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        note("helped")  # a remark
        number = int((workspace.inputs["read"].directory / "number.txt").read_text())
        (workspace.scratch / "number.txt").write_text(str(helper(number) + self.config.add))
        return Outcome(files=["number.txt"])
