"""What training the base and training an expert share: a job from the recipe and the caches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ediffi.train.config import TrainConfig
from pipelines.recipe import Recipe
from pipelines.stage import Json, Manifest, Outcome, Workspace
from pipelines.stages.inputs import joined_shards, stream_configs, without

if TYPE_CHECKING:
    from ediffi.noise import NoiseInterval
    from ediffi.unet import UNetConfig

# These say how often something is written or how much fits at once, not what is learnt.
NOT_IN_IDENTITY = (
    "checkpoint_images",
    "data_workers",
    "keep_checkpoints",
    "log_images",
    "micro_batch_images",
)


def train_identity(config: TrainConfig) -> Json:
    """The settings of one training run that decide its outcome."""
    return without(asdict(config), NOT_IN_IDENTITY)


def network_config(recipe: Recipe, inputs: Mapping[str, Manifest]) -> UNetConfig:
    """The recipe's U-Net, its streams as wide as the caches say."""
    from ediffi.unet import UNetConfig

    return UNetConfig(
        image_px=recipe.data.image_px,
        streams=stream_configs(recipe.encoders, inputs),
        **recipe.network.model_dump(),
    )


def train_unit(
    recipe: Recipe,
    config: TrainConfig,
    interval: NoiseInterval,
    initial: Path | None,
    unit: str,
    workspace: Workspace,
) -> Outcome:
    """Train one denoiser and leave its snapshot in the scratch directory under the unit's name."""
    from ediffi.preconditioning import Preconditioning
    from ediffi.train.loop import TrainJob, train

    job = TrainJob(
        network=network_config(recipe, workspace.inputs),
        preconditioning=Preconditioning(sigma_data=recipe.noise.sigma_data),
        distribution=recipe.noise.distribution,
        interval=interval,
        config=config,
        shards=joined_shards(workspace.inputs, "train"),
        resize=recipe.data.resize,
        missing=recipe.missing_embeddings,
        initial=initial,
        checkpoint_path=workspace.durable / "checkpoints",
        snapshot_path=workspace.scratch / unit,
    )
    summary = train(job, workspace.report)
    if workspace.rank != 0:
        return Outcome()
    num_images = int(summary["images_seen"])
    return Outcome(
        files=[f"{unit}/{path.name}" for path in sorted(job.snapshot_path.iterdir())],
        num_in=num_images,
        num_out=num_images,
        facts={
            "metrics": {"final_loss": summary["final_loss"]},
            "num_parameters": summary["num_parameters"],
        },
        timings={"resumed_from_images": summary["resumed_from_images"]},
    )
