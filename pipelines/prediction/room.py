"""How much room a plan needs at its store: what stages publish, and checkpoints of training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ediffi.train.config import TrainConfig
from pipelines.prediction.cost import Cost
from pipelines.prediction.training import TrainingWork, training_work
from pipelines.recipe import CacheRecipe, Recipe

_BYTES_PER_NUMBER = 4  # weights, moments and averages are kept in fp32
_NUM_MOMENTS = 2


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes that are still to be written, and stages of which nobody knows how many."""

    num_bytes: int = 0
    unknown: tuple[str, ...] = ()


def room_needed(
    recipe: CacheRecipe,
    costs: Mapping[str, Cost | None],
    num_parameters: Mapping[str, int],
) -> Room:
    """Add up what the missing stages of a plan leave.

    Args:
        costs: by missing stage its prediction, None where there is none.
        num_parameters: of networks, by `base` and by the name of super-resolution models.
    """
    num_bytes, unknown = 0, []
    for stage, cost in costs.items():
        work = training_work(recipe, stage)
        size = num_parameters.get(stage.partition("/")[2] or "base", 0)
        if work is not None and isinstance(recipe, Recipe) and size:
            num_bytes += _training_bytes(recipe, stage, work, size)
        elif work is None and cost is not None:
            num_bytes += cost.num_bytes
        else:
            unknown.append(stage)
    return Room(num_bytes=num_bytes, unknown=tuple(unknown))


def _training_bytes(recipe: Recipe, stage: str, work: TrainingWork, num_parameters: int) -> int:
    """Of all units: their snapshots, and as many checkpoints as are kept at the worst moment."""
    each = num_parameters * _BYTES_PER_NUMBER
    num = 0
    for config, images in _runs(recipe, stage, work):
        num_averages = len(config.ema_track_stds) if config.ema_profile == "power" else 1
        num_kept = config.keep_checkpoints + 1  # one is written before the oldest goes
        if config.keep_every_images:
            num_kept += images // config.keep_every_images
        num += num_kept * (1 + _NUM_MOMENTS + num_averages) + 1
    return num * each


def _runs(recipe: Recipe, stage: str, work: TrainingWork) -> Iterable[tuple[TrainConfig, int]]:
    kind, _, model = stage.partition("/")
    source = recipe.super_resolution[model] if model else None
    experts = source.experts if source is not None else recipe.experts
    plain = source.train if source is not None else recipe.base
    config = experts.train if kind.endswith("experts") and experts is not None else plain
    return [(config, images) for images in work.images.values()]


def in_words(room: Room) -> str:
    """`about 12.3 GiB to come`, and what is not in it."""
    words = f"about {room.num_bytes / 1024**3:.1f} GiB to come"
    if room.unknown:
        words += f", without {', '.join(room.unknown)}: `ediffi plan RECIPE --probe 50` can tell"
    return words
