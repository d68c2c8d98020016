"""The last step of the stale-cache toy as a custom stage: its work is done by a closure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from toy import note  # type: ignore[import-not-found]  # beside the recipe too

from pipelines.stage import Manifest, Outcome, Unit, Workspace


def times(factor: int) -> Callable[[int], int]:
    """A function that remembers its factor."""
    return lambda number: number * factor


scale = times(3)


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """The number, scaled."""

    config: dict[str, Any]
    version: ClassVar[int] = 1

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        return [Unit(id="number")]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        note("scaled")
        number = int((workspace.inputs["helped"].directory / "number.txt").read_text())
        (workspace.scratch / "number.txt").write_text(str(scale(number)))
        return Outcome(files=["number.txt"])
