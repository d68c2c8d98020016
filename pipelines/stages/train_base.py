"""Train the base denoiser on the whole noise axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pipelines.recipe import Recipe
from pipelines.stage import Json, Manifest, Outcome, Unit, Workspace
from pipelines.stages.training import (
    data_identity,
    network_config,
    train_identity,
    train_job,
    train_unit,
)


@dataclass(frozen=True, kw_only=True)
class TrainBase:
    """One unit: the base."""

    recipe: Recipe
    embeds: tuple[str, ...]
    name: ClassVar[str] = "base"
    version: ClassVar[int] = 1
    gang: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[str, ...]:
        return ("ingest", *self.embeds)

    def identity(self) -> Json:
        recipe = self.recipe
        return {
            "network": recipe.network.model_dump(mode="json"),
            **data_identity(recipe),
            "image_px": recipe.base_px,
            "train": train_identity(recipe.base),
            **({"keeps_state": True} if self._keeps_state else {}),
        }

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        return [Unit(id="base")]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        job = train_job(
            self.recipe,
            workspace,
            network=network_config(self.recipe, workspace.inputs),
            config=self.recipe.base,
            snapshot_path=workspace.scratch / unit.id,
            durable=workspace.durable,
        )
        return train_unit(job, workspace, keeps_state=self._keeps_state)

    @property
    def _keeps_state(self) -> bool:
        """Whether experts carry on more than the averaged weights."""
        return self.recipe.experts.needs_parent_state
