"""Fine-tune the experts of one super-resolution model, as those of the base are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from pipelines.recipe import Recipe
from pipelines.recipe_sections.super_resolution import SuperResolutionExperts
from pipelines.stage import Json, Manifest, Outcome, Unit, Workspace
from pipelines.stages.expert_chain import ExpertChain, experts_identity
from pipelines.stages.inputs import snapshot_paths
from pipelines.stages.train_super_resolution import STAGE_PREFIX as PARENT_PREFIX
from pipelines.stages.train_super_resolution import super_resolution_job

STAGE_PREFIX = "super_resolution_experts/"


@dataclass(frozen=True, kw_only=True)
class TrainSuperResolutionExperts:
    """One unit is one expert. There is one stage a model that has experts."""

    recipe: Recipe
    model: str  # its name in the recipe
    embeds: tuple[str, ...]
    version: ClassVar[int] = 1
    gang: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return STAGE_PREFIX + self.model

    @property
    def stand_in(self) -> str:
        return PARENT_PREFIX + self.model

    @property
    def min_success(self) -> int | Literal["all"]:
        return self.experts.min_success

    @property
    def needs(self) -> tuple[str, ...]:
        return (PARENT_PREFIX + self.model, "ingest", *self.embeds)

    @property
    def experts(self) -> SuperResolutionExperts:
        experts = self.recipe.super_resolution[self.model].experts
        assert experts is not None  # there is no such stage without
        return experts

    def identity(self) -> Json:
        # network, pictures and degradation reach this stage through the fingerprint of the parent
        return experts_identity(self.experts, self.recipe.noise.distribution)

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        return [Unit(id=name) for name in self.experts.intervals(self.recipe.noise.distribution)]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        parent = workspace.inputs[PARENT_PREFIX + self.model]
        chain = ExpertChain(
            experts=self.experts,
            distribution=self.recipe.noise.distribution,
            workspace=workspace,
            parent=snapshot_paths(parent)[self.model],
            parent_images=self.recipe.super_resolution[self.model].train.final_images,
            make_job=partial(super_resolution_job, self.recipe, workspace, self.model),
        )
        return chain.train(unit)
