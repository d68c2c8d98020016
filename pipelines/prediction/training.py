"""What training will take, by the speed of what was trained before.

An image costs the same in the base, in its experts and in any other run of a network of the same
size, on the same devices, with the same way to train it. So a finished base tells what experts will
take, and training of a few images what training of many will.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from ediffi.noise import SigmaDistribution
from ediffi.train.config import TrainConfig
from pipelines.cost import GANG_STAGES
from pipelines.planning import PlannedStage
from pipelines.prediction.cost import Cost, Rate, predict
from pipelines.prediction.earlier_runs import EarlierRuns
from pipelines.recipe import CacheRecipe, Recipe, Resources
from pipelines.recipe_sections.super_resolution import SuperResolutionExperts
from pipelines.recipe_sections.training import Experts
from pipelines.stage import Json, Manifest
from pipelines.worker.durable import read_reports

# How a batch is computed, and with that how long an image takes.
_SPEED_FIELDS = (
    "batch_images",
    "micro_batch_images",
    "precision",
    "compile",
    "gradient_checkpointing",
    "zero_stage",
    "offload_optimizer",
    "offload_parameters",
)


@dataclass(frozen=True, kw_only=True)
class TrainingWork:
    """One stage of training: images that each unit sees, and all that an image's time hangs on."""

    images: Mapping[str, int]
    speed: Mapping[str, Json]


def training_work(recipe: CacheRecipe, stage: str) -> TrainingWork | None:
    """What a stage trains; None if it trains nothing."""
    kind, _, model = stage.partition("/")
    if kind not in GANG_STAGES or not isinstance(recipe, Recipe):
        return None
    distribution = recipe.noise.distribution
    experts: Experts | SuperResolutionExperts | None
    if kind in ("base", "experts"):
        size = {"network": recipe.network.model_dump(mode="json"), "image_px": recipe.base_px}
        train, experts = recipe.base, recipe.experts
    else:
        enlarging = recipe.super_resolution[model]
        size = {
            "network": enlarging.network.model_dump(mode="json"),
            "image_px": enlarging.image_px,
            "network_px": enlarging.network_px,
        }
        train, experts = enlarging.train, enlarging.experts
    images = {model or kind: train.final_images}
    if kind.endswith("experts"):
        assert experts is not None  # there is no such stage without
        train, images = experts.train, _expert_images(experts, distribution)
    return TrainingWork(
        images=images, speed={**size, **_speed(recipe, train, recipe.resources_of(stage))}
    )


def _expert_images(
    experts: Experts | SuperResolutionExperts, distribution: SigmaDistribution
) -> dict[str, int]:
    return {
        name: sum(run.config.final_images for run in experts.runs(name, distribution))
        for name in experts.intervals(distribution)
    }


def _speed(recipe: Recipe, train: TrainConfig, resources: Resources) -> dict[str, Json]:
    settings = asdict(train)
    return {
        "train": {name: settings[name] for name in _SPEED_FIELDS},
        "tokens": {name: one.max_tokens for name, one in recipe.encoders.items()},
        "devices": [resources.cpus, resources.gpus, resources.num_workers],
    }


def training_rate(work: TrainingWork, planned: PlannedStage, earlier: EarlierRuns) -> Rate | None:
    """Seconds and bytes of an image in the newest training like it, its own stage's first."""
    for manifest in _trained(planned.name, earlier):
        recipe = earlier.recipe(manifest.run_id)
        before = training_work(recipe, manifest.stage) if recipe is not None else None
        if before is None or before.speed != work.speed:
            continue
        num_images = manifest.totals.num_in - manifest.timings.get("resumed_from_images", 0.0)
        if num_images > 0:
            return Rate(
                num_samples_per_unit=manifest.totals.num_in / manifest.num_units,
                seconds=manifest.seconds / num_images,
                num_bytes=manifest.totals.num_bytes / manifest.totals.num_in,
                num_out_fraction=1.0,
                source=f"measured by {manifest.stage} of run {manifest.run_id}",
                num_at_once=earlier.num_at_once(manifest),
            )
    return None


def _trained(first: str, earlier: EarlierRuns) -> Iterator[Manifest]:
    """Finished training, newest first; that of the stage itself before all other."""
    yield from earlier.ledger.manifests(first)
    others = [one for kind in GANG_STAGES for one in earlier.ledger.manifests(kind)]
    yield from sorted(
        (one for one in others if one.stage != first), key=lambda one: one.created, reverse=True
    )


def training_cost(
    work: TrainingWork,
    rate: Rate,
    planned: PlannedStage,
    resources: Resources,
    prices: Mapping[str, float],
    *,
    is_fresh: bool,
) -> Cost | None:
    """What is still to be trained; None if nothing is.

    Args:
        is_fresh: nothing that lies in the stage's folder counts, since its inputs will change.
    """
    left = {
        unit: num_images - (0 if is_fresh else _images_seen(planned, unit))
        for unit, num_images in work.images.items()
        if is_fresh or planned.record.receipt(unit) is None
    }
    if not left:
        return None
    cost = predict(
        rate,
        num_units=len(left),
        num_samples=sum(left.values()),
        num_unsized=0,
        resources=resources,
        num_workers=resources.num_workers,
        prices=prices,
    )
    # what a unit leaves does not grow with the images it has seen
    num_bytes = round(len(left) * rate.num_samples_per_unit * rate.num_bytes)
    # the longest unit is waited for, however many run beside it
    longest_s = max(left.values()) * rate.seconds
    at_once = rate.num_at_once or (1.0 if len(left) == 1 else 0.0)
    seconds = max(longest_s, sum(left.values()) * rate.seconds / at_once) if at_once else None
    return Cost(**{**asdict(cost), "num_bytes": num_bytes, "seconds": seconds})


def _images_seen(planned: PlannedStage, unit: str) -> int:
    """As its reports tell; what came after its newest checkpoint will be trained again."""
    rows = read_reports(planned.record.durable_path(unit)).rows
    return int(rows[-1].get("images", 0)) if rows else 0
