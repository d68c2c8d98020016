"""Which stages a recipe needs, which of them the store already holds, and why not the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipelines.driver.stand_ins import shortfall
from pipelines.errors import UserError
from pipelines.recipe import CacheRecipe
from pipelines.stage import Json, Manifest, Stage
from pipelines.stage_graph import build_stages
from pipelines.store.fingerprint import changes, fingerprint
from pipelines.store.ledger import Ledger
from pipelines.store.stage_record import StageRecord

MAX_EARLIER = 3  # fingerprints of a stage that are searched for units to take over


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """A stage with its address, and why it must run (empty: the store holds it)."""

    stage: Stage
    fingerprint: str
    inputs: Mapping[str, str]
    record: StageRecord
    reasons: tuple[str, ...]
    earlier: tuple[str, ...] = ()  # older fingerprints, newest first; a hit names none

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def is_hit(self) -> bool:
        return not self.reasons


def plan(recipe: CacheRecipe, ledger: Ledger) -> list[PlannedStage]:
    """All stages of a recipe in an order in which they can run. Does no work.

    Raises:
        UserError: a stage cannot say what it stands for, such as an encoder without its weights.
    """
    planned: dict[str, PlannedStage] = {}
    found: dict[str, Manifest] = {}
    for stage in build_stages(recipe):
        inputs = {name: planned[name].fingerprint for name in stage.needs}
        try:
            address = fingerprint(stage, inputs)
        except ValueError as error:
            raise UserError(f"{stage.name}: {error}") from error
        record = ledger.stage(stage.name, address)
        manifest = record.manifest() if record.is_complete else None
        reasons = _why_stale(manifest, stage, found) or _why_short(manifest, stage)
        earlier: tuple[str, ...] = ()
        if manifest is None:
            earlier = _earlier(ledger, stage.name, address)
            reasons = _why_missing(stage, inputs, record, ledger)
        elif not reasons:
            found[stage.name] = manifest
        planned[stage.name] = PlannedStage(
            stage=stage,
            fingerprint=address,
            inputs=inputs,
            record=record,
            reasons=reasons,
            earlier=earlier,
        )
    return list(planned.values())


def describe(stage: Stage, inputs: Mapping[str, str]) -> Json:
    """What a fingerprint stands for, as kept beside the stage's files."""
    return {"version": stage.version, "config": stage.identity(), "input": dict(inputs)}


def contents_of(names: Iterable[str], manifests: Mapping[str, Manifest]) -> dict[str, str]:
    """What the inputs of a stage hold: their receipts' digests by name."""
    return {name: manifests[name].contents for name in names}


def _why_stale(
    manifest: Manifest | None, stage: Stage, found: Mapping[str, Manifest]
) -> tuple[str, ...]:
    """Why a finished stage must be looked at again: an input was redone, repaired or retried."""
    if manifest is None:
        return ()
    absent = [name for name in stage.needs if name not in found]
    if absent:
        return (f"{', '.join(absent)} must be finished first; kept if that comes out as before",)
    return tuple(
        f"contents of {name} changed since: units that depend on what changed are done again"
        for name in stage.needs
        if manifest.input_contents.get(name) != found[name].contents
    )


def _why_short(manifest: Manifest | None, stage: Stage) -> tuple[str, ...]:
    """Why a finished stage is not enough: something stands in for units this recipe wants."""
    why = shortfall(stage, manifest) if manifest is not None else ""
    return (why,) if why else ()


def _why_missing(
    stage: Stage, inputs: Mapping[str, str], record: StageRecord, ledger: Ledger
) -> tuple[str, ...]:
    """Why a stage misses, against the newest finished stage of the same name."""
    if num_done := len(record.done_units()):
        return (f"unfinished: {num_done} units are done and will be kept",)
    earlier = next(iter(ledger.manifests(stage.name)), None)
    if earlier is None:
        return ("never run",)
    return tuple(changes(earlier.identity, describe(stage, inputs)))


def _earlier(ledger: Ledger, name: str, address: str) -> tuple[str, ...]:
    """Older fingerprints of a stage, newest first."""
    others = [
        record
        for record in ledger.records(name)
        if record.fingerprint != address and record.is_begun
    ]
    others.sort(key=lambda one: (one.directory / "identity.json").stat().st_mtime, reverse=True)
    return tuple(record.fingerprint for record in others[:MAX_EARLIER])
