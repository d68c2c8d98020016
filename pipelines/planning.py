"""Which stages a recipe needs, which of them the store already holds, and why not the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.errors import UserError
from pipelines.fingerprint import changes, fingerprint
from pipelines.ledger import Ledger, StageRecord
from pipelines.recipe import Recipe
from pipelines.stage import Json, Stage
from pipelines.stages import build_stages


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """A stage with its address, and why it must run (empty: the store holds it)."""

    stage: Stage
    fingerprint: str
    inputs: Mapping[str, str]
    record: StageRecord
    reasons: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def is_hit(self) -> bool:
        return not self.reasons


def plan(recipe: Recipe, ledger: Ledger) -> list[PlannedStage]:
    """All stages of a recipe in an order in which they can run. Does no work.

    Raises:
        UserError: a stage cannot say what it stands for, such as an encoder without its weights.
    """
    planned: dict[str, PlannedStage] = {}
    for stage in build_stages(recipe):
        inputs = {name: planned[name].fingerprint for name in stage.needs}
        try:
            address = fingerprint(stage, inputs)
        except ValueError as error:
            raise UserError(f"{stage.name}: {error}") from error
        record = ledger.stage(stage.name, address)
        reasons = () if record.is_complete else _reasons(stage, inputs, record, ledger)
        planned[stage.name] = PlannedStage(
            stage=stage, fingerprint=address, inputs=inputs, record=record, reasons=reasons
        )
    return list(planned.values())


def describe(stage: Stage, inputs: Mapping[str, str]) -> Json:
    """What a fingerprint stands for, as kept beside the stage's files."""
    return {"version": stage.version, "config": stage.identity(), "input": dict(inputs)}


def _reasons(
    stage: Stage, inputs: Mapping[str, str], record: StageRecord, ledger: Ledger
) -> tuple[str, ...]:
    """Why a stage misses, against the newest finished stage of the same name."""
    if record.num_receipts:
        return (f"unfinished: {record.num_receipts} units are done and will be kept",)
    earlier = next(ledger.manifests(stage.name), None)
    if earlier is None:
        return ("never run",)
    return tuple(changes(earlier.identity, describe(stage, inputs)))
