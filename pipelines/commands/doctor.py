"""`ediffi doctor`: would a run work here, with this store, this recipe, this cluster?"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.commands.options import STORE, json_option
from pipelines.errors import UserError
from pipelines.store.ledger import Ledger

if TYPE_CHECKING:
    from cluster.doctor import Finding, Needs
    from cluster.profile import Profile
    from pipelines.recipe import CacheRecipe
    from pipelines.stage import Manifest

MIN_FREE_GIB = 10.0  # where nothing better is known
SPARE_GIB = 1.0


def doctor_options(verb: argparse.ArgumentParser) -> None:
    """A recipe, a profile, and `--json`."""
    verb.add_argument("recipe", nargs="?", default="", help="also check what this recipe needs")
    verb.add_argument(
        "--cluster", default="", metavar="PROFILE", help="also check what this place needs"
    )
    json_option(verb)


def doctor(options: argparse.Namespace) -> int:
    """Ask the machine whether a run would work; exit code 1 if something is wrong."""
    findings = _findings(options)
    for finding in findings:
        if options.json:
            print(json.dumps(asdict(finding)))
            continue
        print(f"{'ok  ' if finding.ok else 'BAD '} {finding.name:<16} {finding.found}")
        if not finding.ok:
            print(f"     {'':<16} -> {finding.remedy}")
    return 0 if all(finding.ok for finding in findings) else 1


def _findings(options: argparse.Namespace) -> list[Finding]:
    from cluster.doctor import check_place, check_stages, examine
    from pipelines.commands.doctor_needs import unit_needs
    from pipelines.commands.doctor_store import check_shared, check_store

    recipe = _recipe(options.recipe)
    profile = _profile(options.cluster)  # a wrong name is told before anything is tried
    # as `ediffi submit` chooses it
    is_theirs = profile is not None and profile.store and options.store == STORE
    ledger = Ledger.at(profile.store if profile is not None and is_theirs else options.store)
    weights, elsewhere = _weights(recipe, profile)
    store = check_store(ledger)
    # a store that does not answer cannot say what it has already
    room = (MIN_FREE_GIB, "")
    if recipe is not None and store[0].ok:
        room = _room(recipe, ledger)
    needs = _needs(recipe, profile, ledger, weights, room)
    findings = [*examine(needs), *elsewhere, *store]
    if profile is not None:
        units = unit_needs(recipe) if recipe is not None else {}
        findings += check_shared(profile, ledger)
        findings += [*check_place(profile), *check_stages(profile, units)]
    address = os.environ.get("RAY_ADDRESS", "")
    if address and store[0].ok:
        from cluster.doctor import NodeNeeds
        from pipelines.commands.doctor_nodes import check_nodes

        there = NodeNeeds(
            disk_path=Path(tempfile.gettempdir()),
            free_disk_gib=SPARE_GIB if isinstance(ledger.store, Path) else MIN_FREE_GIB,
            weights=_locations(recipe),
        )
        findings += check_nodes(address, str(ledger.store), there)
    return findings


def _needs(
    recipe: CacheRecipe | None,
    profile: Profile | None,
    ledger: Ledger,
    weights: dict[str, str],
    room: tuple[float, str],
) -> Needs:
    """Of this machine: all that the recipe takes, unless it only submits it."""
    from cluster.doctor import Needs
    from pipelines.commands.doctor_needs import environment_there, machine_needs, unit_needs
    from pipelines.tracking.place import default_uri

    store, environment = ledger.store, dict(os.environ)
    if profile is not None:
        environment = environment_there(profile, os.environ)
    works_here = "RAY_ADDRESS" not in os.environ and (profile is None or profile.kind == "local")
    needs = Needs(
        # beside an object store, work in flight needs room in the directory for temporary files
        disk_path=store if isinstance(store, Path) else Path(tempfile.gettempdir()),
        free_disk_gib=room[0] if isinstance(store, Path) else MIN_FREE_GIB,
        free_disk_why=room[1],
        lock_path=Path(__file__).parents[2] / "requirements.lock",
        tracking_uri=environment.get("MLFLOW_TRACKING_URI") or default_uri(store),
        weights=weights,
    )
    return machine_needs(needs, unit_needs(recipe)) if works_here and recipe is not None else needs


def _weights(
    recipe: CacheRecipe | None, profile: Profile | None
) -> tuple[dict[str, str], list[Finding]]:
    """Those to look for on this machine; of the others, that they are not looked for."""
    from cluster.doctor import Finding

    here: dict[str, str] = {}
    elsewhere = []
    for name, location in _locations(recipe).items():
        if profile is None or profile.shares(location if location.startswith("/") else "/"):
            here[name] = location
        else:
            found = f"{location}: not looked for here; run `ediffi doctor` as a job there"
            elsewhere.append(Finding(name=f"weights of {name}", ok=True, found=found))
    return here, elsewhere


def _locations(recipe: CacheRecipe | None) -> dict[str, str]:
    from pipelines.commands.doctor_needs import weights_of

    return weights_of(recipe) if recipe is not None else {}


def _recipe(name: str) -> CacheRecipe | None:
    if not name:
        return None
    from pipelines.recipe_file import load_any_recipe

    return load_any_recipe(name)


def _profile(name: str) -> Profile | None:
    if not name:
        return None
    from cluster.profile import load_profile

    try:
        return load_profile(name)
    except ValueError as error:
        raise UserError(f"--cluster: {error}") from error


def _room(recipe: CacheRecipe, ledger: Ledger) -> tuple[float, str]:
    """GiB that the recipe has still to write, and in words what they are."""
    from pipelines.commands.plan import look_ahead
    from pipelines.commands.prices import Prices
    from pipelines.planning import plan
    from pipelines.prediction.room import in_words, room_needed

    try:
        planned = plan(recipe, ledger)
    except UserError as error:
        return MIN_FREE_GIB, f"the recipe cannot be planned from here: {error}"
    manifests = {one.name: one.record.manifest() for one in planned if one.is_hit}
    outlooks = look_ahead(recipe, ledger, planned, manifests, {}, {}, Prices())
    missing = {one.planned.name: one.cost for one in outlooks if not one.planned.is_hit}
    room = room_needed(recipe, missing, _num_parameters(recipe, manifests))
    required_gib = room.num_bytes / 1024**3 + SPARE_GIB
    return max(required_gib, MIN_FREE_GIB if room.unknown else 0.0), in_words(room)


def _num_parameters(recipe: CacheRecipe, manifests: Mapping[str, Manifest]) -> dict[str, int]:
    """Of each network, as far as the widths of its streams are known."""
    from pipelines.prediction.network_size import network_sizes
    from pipelines.prediction.stream_widths import stream_widths
    from pipelines.recipe import Recipe

    if not isinstance(recipe, Recipe):
        return {}
    try:
        sizes = network_sizes(recipe, stream_widths(recipe, manifests))
    except ValueError:  # told by `ediffi network`, and when the recipe is run
        return {}
    return {one.name: one.num_parameters for one in sizes}
