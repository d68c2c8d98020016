"""Train one super-resolution model: from low-resolution pictures to large ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.recipe import Recipe
from pipelines.recipe_sections.super_resolution import SuperResolution
from pipelines.stage import Json, Manifest, Outcome, Unit, Workspace
from pipelines.stages.inputs import stream_configs
from pipelines.stages.training import data_identity, train_identity, train_job, train_unit

if TYPE_CHECKING:
    from ediffi.train.job import TrainJob

STAGE_PREFIX = "super_resolution/"


@dataclass(frozen=True, kw_only=True)
class TrainSuperResolution:
    """One unit: the model. There is one stage a model, so that they leave each other alone."""

    recipe: Recipe
    model: str  # its name in the recipe
    embeds: tuple[str, ...]
    version: ClassVar[int] = 1
    gang: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return STAGE_PREFIX + self.model

    @property
    def needs(self) -> tuple[str, ...]:
        return ("ingest", *self.embeds)

    @property
    def config(self) -> SuperResolution:
        return self.recipe.super_resolution[self.model]

    def identity(self) -> Json:
        recipe, config = self.recipe, self.config
        return {
            "network": config.network.model_dump(mode="json"),
            **data_identity(recipe),
            "image_px": config.image_px,
            "low_res_px": config.low_res_px,
            "patch_px": config.patch_px,
            "degradation": asdict(config.degradation),
            "train": train_identity(config.train),
            **({"keeps_state": True} if self._keeps_state else {}),
        }

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        return [Unit(id=self.model)]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        job = super_resolution_job(
            self.recipe,
            workspace,
            self.model,
            config=self.config.train,
            snapshot_path=workspace.scratch / unit.id,
            durable=workspace.durable,
        )
        return train_unit(job, workspace, keeps_state=self._keeps_state)

    @property
    def _keeps_state(self) -> bool:
        """Whether experts carry on more than the averaged weights."""
        return self.config.experts is not None and self.config.experts.needs_parent_state


def super_resolution_job(
    recipe: Recipe, workspace: Workspace, model: str, **of_the_run: Any
) -> TrainJob:
    """`train_job` for a super-resolution model or one of its experts: network, pictures, input.

    Args:
        model: its name in the recipe.
        of_the_run: the other arguments of `train_job`.
    """
    from ediffi.degradation import LowRes

    config = recipe.super_resolution[model]
    return train_job(
        recipe,
        workspace,
        network=config.network_config(stream_configs(recipe.encoders, workspace.inputs)),
        picture_px=config.image_px,
        low_res=LowRes(factor=config.factor, degradation=config.degradation),
        **of_the_run,
    )
