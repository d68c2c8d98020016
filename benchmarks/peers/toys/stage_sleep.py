"""A custom stage whose units take their time without taking any CPU; they tell where they ran."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from toy import note  # type: ignore[import-not-found]  # beside the recipe too

from pipelines.stage import Manifest, Outcome, Unit, Workspace


@dataclass(frozen=True)
class Config:
    """`label` keeps apart what would be the same stage."""

    num_units: int
    unit_s: float
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Sleep:
    """Stands for experts: `num_units` units that sleep, in the workers that training gets."""

    config: Config
    version: ClassVar[int] = 1
    gang: ClassVar[bool] = True

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        return [Unit(id=f"expert{index}") for index in range(self.config.num_units)]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        import ray

        note(f"{unit.id}@{ray.get_runtime_context().get_node_id()}")
        time.sleep(self.config.unit_s)
        return Outcome()
