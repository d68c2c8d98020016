"""What a recipe needs, in the words of `cluster.doctor`: of one machine, of nodes, of encoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil

from cluster.doctor import Needs, UnitNeeds
from cluster.profile import Profile
from pipelines.cost import GANG_STAGES
from pipelines.recipe import CacheRecipe

ON_FILE = ("package:", "hf-hub:")


def unit_needs(recipe: CacheRecipe) -> dict[str, UnitNeeds]:
    """By stage, of those whose resources the recipe states; others take one core."""
    found = {}
    for stage, one in recipe.resources.items():
        # whether a stage of the user's own is a gang, only its class can tell
        is_gang = stage in GANG_STAGES or stage in recipe.custom_stages
        found[stage] = UnitNeeds(
            num_workers=one.num_workers if is_gang else 1,
            cpus=one.cpus,
            gpus=one.gpus,
            memory_gib=one.memory_gib,
            node_group=one.node_group,
            placement=one.placement,
        )
    return found


def machine_needs(needs: Needs, units: Mapping[str, UnitNeeds]) -> Needs:
    """What one machine must have for the largest unit, too."""
    everything = units.values()
    has_gangs = any(one.num_workers > 1 for one in everything)
    return replace(
        needs,
        num_cpus=max([needs.num_cpus, *(ceil(one.num_workers * one.cpus) for one in everything)]),
        num_accelerators=max([0, *(ceil(one.num_workers * one.gpus) for one in everything)]),
        memory_gib=max(
            [needs.memory_gib, *(one.num_workers * one.memory_gib for one in everything)]
        ),
        shared_memory_gib=2.0 if has_gangs else needs.shared_memory_gib,  # gangs talk there
    )


def weights_of(recipe: CacheRecipe) -> dict[str, str]:
    """Where each encoder's weights are, as the doctor reads it; not those that a stage makes."""
    return {
        name: one.weights
        if one.family == "transformers" or "/" in one.weights or one.weights.startswith(ON_FILE)
        else f"open_clip:{one.model}:{one.weights}"
        for name, one in recipe.encoders.items()
        if not one.is_fitted and not one.cache
    }


def environment_there(profile: Profile, here: Mapping[str, str]) -> dict[str, str]:
    """Variables that a job at that place has, as far as they are known here."""
    passed = {name: here[source] for name, source in profile.passed.items() if source in here}
    inherited = dict(here) if profile.kind == "local" else {}
    return {**inherited, **passed, **profile.environment}
