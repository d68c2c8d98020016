"""Train one super-resolution model: from low-resolution pictures to large ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

from pipelines.recipe import Recipe
from pipelines.recipe_super_resolution import SuperResolution
from pipelines.stage import Json, Manifest, Outcome, Unit, Workspace
from pipelines.stages.inputs import stream_configs
from pipelines.stages.training import data_identity, train_identity, train_job, train_unit

if TYPE_CHECKING:
    from ediffi.network import NetworkConfig

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
        }

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        return [Unit(id=self.model)]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        from ediffi.degradation import LowRes

        job = train_job(
            self.recipe,
            workspace,
            network=self.network_config(workspace.inputs),
            config=self.config.train,
            snapshot_path=workspace.scratch / unit.id,
            durable=workspace.durable,
            picture_px=self.config.image_px,
            low_res=LowRes(factor=self.config.factor, degradation=self.config.degradation),
        )
        return train_unit(job, workspace)

    def network_config(self, inputs: Mapping[str, Manifest]) -> NetworkConfig:
        """The model's Efficient U-Net, its streams as wide as the caches say."""
        from ediffi.efficient_unet import EfficientUNetConfig

        return EfficientUNetConfig(
            image_px=self.config.network_px,
            low_res_factor=self.config.factor,
            streams=stream_configs(self.recipe.encoders, inputs),
            **self.config.network.model_dump(),
        )
