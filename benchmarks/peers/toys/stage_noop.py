"""A custom stage that does nothing, as a user would write it beside a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from toy import note  # type: ignore[import-not-found]  # beside the recipe too

from pipelines.stage import Manifest, Outcome, Unit, Workspace


@dataclass(frozen=True)
class Config:
    """`setting` changes nothing but the fingerprint."""

    num_units: int = 1
    setting: int = 0


@dataclass(frozen=True, kw_only=True)
class NoOp:
    """Does nothing, `num_units` times."""

    config: Config
    version: ClassVar[int] = 1

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        return [Unit(id=f"{index:03d}") for index in range(self.config.num_units)]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        note(unit.id)
        return Outcome()
