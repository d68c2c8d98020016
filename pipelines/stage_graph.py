"""The graph of stages that a recipe makes."""

from __future__ import annotations

from pipelines.recipe import CacheRecipe, Recipe
from pipelines.stage import Stage
from pipelines.stages.assemble import Assemble
from pipelines.stages.clip_fit import FitClip
from pipelines.stages.custom import add_custom
from pipelines.stages.embed import Embed
from pipelines.stages.embed_cache import AdoptCache
from pipelines.stages.evaluate import Evaluate
from pipelines.stages.ingest import ingest_stage
from pipelines.stages.report import Report
from pipelines.stages.sample import Sample
from pipelines.stages.train_base import TrainBase
from pipelines.stages.train_experts import TrainExperts
from pipelines.stages.train_super_resolution import TrainSuperResolution
from pipelines.stages.train_super_resolution_experts import TrainSuperResolutionExperts


def build_stages(recipe: CacheRecipe) -> list[Stage]:
    """Every stage of a recipe, each after those it needs.

    Raises:
        UserError: a custom stage cannot be had, see `pipelines.stages.custom`.
    """
    stages = _our_stages(recipe)
    return add_custom(stages, recipe.custom_stages) if recipe.custom_stages else stages


def _our_stages(recipe: CacheRecipe) -> list[Stage]:
    stages: list[Stage] = [ingest_stage(recipe)]
    if recipe.clip_fit is not None:
        stages.append(FitClip(config=recipe.clip_fit, seed=recipe.seed))
    embeds = [
        AdoptCache(encoder_name=name, encoder=encoder)
        if encoder.cache
        else Embed(encoder_name=name, encoder=encoder, max_pixels=recipe.data.max_pixels)
        for name, encoder in recipe.encoders.items()
    ]
    stages += embeds
    if not isinstance(recipe, Recipe):
        return stages
    embed_names = tuple(embed.name for embed in embeds)
    return [
        *stages,
        TrainBase(recipe=recipe, embeds=embed_names),
        TrainExperts(recipe=recipe, embeds=embed_names),
        *(
            TrainSuperResolution(recipe=recipe, model=name, embeds=embed_names)
            for name in recipe.super_resolution
        ),
        *(
            TrainSuperResolutionExperts(recipe=recipe, model=name, embeds=embed_names)
            for name, model in recipe.super_resolution.items()
            if model.experts is not None
        ),
        Assemble(recipe=recipe, embeds=embed_names),
        Sample(config=recipe.sample, seed=recipe.seed),
        Evaluate(recipe=recipe, embeds=embed_names),
        Report(),
    ]
