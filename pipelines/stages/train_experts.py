"""Fine-tune one expert a noise interval, from the base's snapshot, directly or level by level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from pipelines.recipe import Recipe
from pipelines.stage import Json, Manifest, Outcome, Unit, Workspace
from pipelines.stages.expert_chain import ExpertChain, experts_identity
from pipelines.stages.inputs import snapshot_paths
from pipelines.stages.training import network_config, train_job


@dataclass(frozen=True, kw_only=True)
class TrainExperts:
    """One unit is one expert; they neither see nor wait for one another."""

    recipe: Recipe
    embeds: tuple[str, ...]
    name: ClassVar[str] = "experts"
    version: ClassVar[int] = 1
    gang: ClassVar[bool] = True
    stand_in: ClassVar[str] = "base"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("base", "ingest", *self.embeds)

    @property
    def min_success(self) -> int | Literal["all"]:
        return self.recipe.experts.min_success

    def identity(self) -> Json:
        return {
            **experts_identity(self.recipe.experts, self.recipe.noise.distribution),
            # the base's settings reach this stage through its fingerprint; these two are read again
            "image_px": self.recipe.base_px,
            "resize": self.recipe.data.resize,
        }

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        intervals = self.recipe.experts.intervals(self.recipe.noise.distribution)
        return [Unit(id=name) for name in intervals]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        network = network_config(self.recipe, workspace.inputs)
        chain = ExpertChain(
            experts=self.recipe.experts,
            distribution=self.recipe.noise.distribution,
            workspace=workspace,
            parent=snapshot_paths(workspace.inputs["base"])["base"],
            parent_images=self.recipe.base.final_images,
            make_job=partial(train_job, self.recipe, workspace, network=network),
        )
        return chain.train(unit)
