"""What all training stages share: a job from the recipe and the caches, and doing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ediffi.noise import WHOLE, NoiseInterval
from ediffi.train.config import TrainConfig
from pipelines.recipe import Recipe
from pipelines.recipe_sections.sampling import SamplerSettings
from pipelines.stage import Json, Manifest, Outcome, Workspace
from pipelines.stages.inputs import joined_shards, stream_configs, without
from pipelines.worker.durable import CHECKPOINTS_FOLDER, GRIDS_FOLDER

if TYPE_CHECKING:
    from ediffi.degradation import LowRes
    from ediffi.network import NetworkConfig
    from ediffi.train.held_out import GridConfig
    from ediffi.train.job import TrainJob
    from ediffi.train.start import Start
    from ediffi.unet import UNetConfig

# These say how often something is written or shown, how much fits at once and how fast it goes,
# not what is learnt.
NOT_IN_IDENTITY = (
    "checkpoint_images",
    "compile",
    "data_workers",
    "gradient_checkpointing",
    "grid_images",
    "held_out_images",
    "held_out_samples",
    "keep_checkpoints",
    "keep_every_images",
    "log_images",
    "micro_batch_images",
    "offload_optimizer",
    "offload_parameters",
)
# Settings that came later. At these values training does what it did before they existed, so
# they are left out and finished work keeps its fingerprint.
NEUTRAL: dict[str, Json] = {
    "on_spike": "stop",
    "spike_factor": 0.0,
    "max_spikes": 10,
    "ema_profile": "half_life",
}
# What only one kind of average looks at.
OF_PROFILE = {
    "half_life": ("ema_half_life_images", "ema_ramp_fraction"),
    "power": ("ema_std", "ema_track_stds", "ema_snapshot_images"),
}
GRID_PICTURES = 16  # in a grid drawn while training


def train_identity(config: TrainConfig) -> Json:
    """The settings of one training run that decide its outcome."""
    unused = [
        name for kind, names in OF_PROFILE.items() if kind != config.ema_profile for name in names
    ]
    values = without(asdict(config), (*NOT_IN_IDENTITY, *unused))
    return {name: one for name, one in values.items() if (name, one) not in NEUTRAL.items()}


def data_identity(recipe: Recipe) -> dict[str, Json]:
    """What every trained model takes from the recipe: noise levels, pictures, streams."""
    return {
        "noise": recipe.noise.model_dump(mode="json"),
        "resize": recipe.data.resize,
        "missing_embeddings": recipe.missing_embeddings,
        "streams": list(recipe.encoders),  # their order is the order of the context
        "dropout": {name: encoder.dropout for name, encoder in recipe.encoders.items()},
    }


def network_config(recipe: Recipe, inputs: Mapping[str, Manifest]) -> UNetConfig:
    """The recipe's U-Net, its streams as wide as the caches say."""
    return recipe.network.config(recipe.base_px, stream_configs(recipe.encoders, inputs))


def train_job(
    recipe: Recipe,
    workspace: Workspace,
    *,
    snapshot_path: Path,
    durable: Path,
    network: NetworkConfig,
    config: TrainConfig,
    interval: NoiseInterval = WHOLE,
    start: Start | None = None,
    base: Path | None = None,
    picture_px: int = 0,
    low_res: LowRes | None = None,
) -> TrainJob:
    """Describe one training run to the model library.

    Args:
        snapshot_path: where the result goes.
        durable: where checkpoints and grids go, in storage that all ranks share.
    """
    from ediffi.preconditioning import Preconditioning
    from ediffi.train.job import TrainJob

    watches = config.held_out_images or config.grid_images
    return TrainJob(
        network=network,
        preconditioning=Preconditioning(sigma_data=recipe.noise.sigma_data),
        distribution=recipe.noise.distribution,
        interval=interval,
        config=config,
        shards=joined_shards(workspace.inputs, "train"),
        held_out=joined_shards(workspace.inputs, "held_out") if watches else (),
        resize=recipe.data.resize,
        missing=recipe.missing_embeddings,
        picture_px=picture_px,
        low_res=low_res,
        start=start,
        base=base,
        grid=_grid(recipe, recipe.sample.enlarging if low_res else recipe.sample),
        checkpoint_path=durable / CHECKPOINTS_FOLDER,
        snapshot_path=snapshot_path,
        grid_path=durable / GRIDS_FOLDER,
    )


def _grid(recipe: Recipe, settings: SamplerSettings) -> GridConfig:
    """How pictures are drawn while training: as the recipe samples, without streams of pictures."""
    from ediffi.train.held_out import GridConfig

    return GridConfig(
        **asdict(settings.config()),
        num_pictures=GRID_PICTURES,
        seed=recipe.seed,
        dropped_streams=tuple(name for name, one in recipe.encoders.items() if one.is_image),
    )


def train_unit(job: TrainJob, workspace: Workspace, *, keeps_state: bool = False) -> Outcome:
    """Train one denoiser; its snapshot, in a folder of scratch, is what the unit leaves.

    Args:
        keeps_state: leave the last checkpoint too, for children that carry on more than weights.
    """
    from ediffi.train.loop import train
    from ediffi.train.start import publish_state

    summary = train(job, workspace.report, workspace.should_stop)
    if workspace.rank != 0:
        return Outcome()
    if keeps_state:
        publish_state(job.checkpoint_path, job.snapshot_path)
    num_images = int(summary["images_seen"])
    files = sorted(path for path in job.snapshot_path.rglob("*") if path.is_file())
    return Outcome(
        files=[str(path.relative_to(workspace.scratch)) for path in files],
        num_in=num_images,
        num_out=num_images,
        facts={
            "metrics": {"final_loss": summary["final_loss"]},
            "num_parameters": summary["num_parameters"],
            "num_spikes": summary["num_spikes"],
        },
        timings={"resumed_from_images": summary["resumed_from_images"]},
    )
