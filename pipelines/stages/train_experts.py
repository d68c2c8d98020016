"""Fine-tune one expert a noise interval, each from the base's snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ediffi.noise import NoiseInterval
from pipelines.recipe import Recipe
from pipelines.stage import Json, Manifest, Outcome, Unit, Workspace
from pipelines.stages.inputs import snapshot_paths
from pipelines.stages.training import train_identity, train_unit


@dataclass(frozen=True, kw_only=True)
class TrainExperts:
    """One unit is one expert; they neither see nor wait for one another."""

    recipe: Recipe
    embeds: tuple[str, ...]
    name: ClassVar[str] = "experts"
    version: ClassVar[int] = 1
    gang: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[str, ...]:
        return ("base", "ingest", *self.embeds)

    def identity(self) -> Json:
        return {
            "intervals": {name: interval.to_json() for name, interval in self._intervals.items()},
            "train": train_identity(self.recipe.experts.train),
            # the base's settings reach this stage through its fingerprint; these two are read again
            "image_px": self.recipe.data.image_px,
            "resize": self.recipe.data.resize,
        }

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        return [Unit(id=name) for name in self._intervals]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        initial = snapshot_paths(workspace.inputs["base"])["base"]
        interval = self._intervals[unit.id]
        config = self.recipe.experts.train
        return train_unit(self.recipe, config, interval, initial, unit.id, workspace)

    @property
    def _intervals(self) -> dict[str, NoiseInterval]:
        return self.recipe.experts.intervals(self.recipe.noise.distribution)
