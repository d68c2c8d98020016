"""Finding stages in a store by what a person types: a name, a fingerprint, its beginning, a run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from pipelines.errors import UserError
from pipelines.planning import PlannedStage, plan
from pipelines.recipe import CacheRecipe
from pipelines.recipe_file import resolved_recipe
from pipelines.stage import CIRCUMSTANCES_FILE, File, Json, Manifest, Receipt
from pipelines.store.ledger import Ledger
from pipelines.store.location import Location, read_text
from pipelines.store.stage_record import StageRecord

EVERYTHING = "*"
NUM_SHOWN = 5  # of what a message lists
_FINGERPRINT = re.compile(r"[0-9a-f]{4,}")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A stage's folder in the store, and the stage's name."""

    name: str
    record: StageRecord

    @property
    def fingerprint(self) -> str:
        return self.record.fingerprint

    @property
    def address(self) -> str:
        """`embed/t5/1f0c...`: what stands in the store, and what a person may type."""
        return f"{self.name}/{self.fingerprint}"

    def manifest(self) -> Manifest | None:
        """The manifest; None for an unfinished stage.

        Raises:
            Damaged: it is half there, or another version of ediffi wrote it.
        """
        try:
            return self.record.manifest()
        except FileNotFoundError:
            return None

    def path(self, file: File) -> Location:
        """Where a file of one of its receipts lies."""
        return file.place(self.record.directory)

    def local_path(self, file: File) -> Path:
        """The file on this machine: where it lies, or a verified copy in the local cache."""
        path = self.path(file)
        if isinstance(path, Path):
            return path
        from ediffi.storage.local_cache import LocalCache

        return LocalCache.default().fetch(str(path), sha256=file.sha256, num_bytes=file.num_bytes)

    def identity(self) -> Json:
        """What the fingerprint stands for: version, config and input; {} where nobody noted it.

        Raises:
            Damaged: it is half there, or something else wrote it.
        """
        noted = self.record.noted()
        return {} if noted is None else noted["identity"]

    def inputs(self) -> Mapping[str, str]:
        """Fingerprints of the stages that it was made from. Raises Damaged as `identity`."""
        return self.identity().get("input", {})

    def receipts(self) -> Iterator[Receipt]:
        """Every receipt that is there: those of a finished stage in the order of its units."""
        manifest = self.manifest()
        if manifest is not None:
            yield from manifest.receipts
            return
        for unit in sorted(self.record.done_units()):
            receipt = self.record.receipt(unit)
            if receipt is not None:
                yield receipt


def stages_of(ledger: Ledger, text: str = EVERYTHING) -> list[Found]:
    """Stages whose folder is in the store, finished or not, by name.

    Args:
        text: `*` for all, a stage (`embed` names all of `embed/...`), a fingerprint or its
            beginning (4 digits at least), or both as in `embed/t5/1f0c`.

    Raises:
        UserError: the store has no such stage or fingerprint.
    """
    everything = list(_all(ledger))
    if text == EVERYTHING:
        return everything
    found = [one for one in everything if one.name == text or one.name.startswith(f"{text}/")]
    found = found or [one for one in everything if _begins(one, text)]
    if not found:
        raise UserError(_unknown(ledger, text, everything))
    return found


def only_stage(ledger: Ledger, text: str) -> Found:
    """The one stage named by a fingerprint, its beginning, or `stage/fingerprint`.

    Raises:
        UserError: none is named so, or several are.
    """
    found = stages_of(ledger, text)
    if len(found) > 1:
        shown = ", ".join(one.address for one in found[:NUM_SHOWN])
        raise UserError(
            f"{text!r} names {len(found)} stages in {ledger.store}: {shown}"
            f"{', ...' * (len(found) > NUM_SHOWN)}; give more of the fingerprint"
        )
    return found[0]


def stages_of_run(ledger: Ledger, record: Json) -> dict[str, Found]:
    """Stages that a run made, found, or would have come to, by name; those in the store."""
    found = {
        name: Found(name=name, record=ledger.stage(name, fingerprint))
        for name, fingerprint in planned_by(record).items()
    }
    return {name: one for name, one in found.items() if one.record.is_begun}


def planned_by(record: Json) -> dict[str, str]:
    """Fingerprint of every stage that a run's record names.

    They are not planned anew: what the recipe reads may have changed, or be named by a path that
    is relative to where the run was started.
    """
    rows = {row["name"]: row["fingerprint"] for row in record["stages"]}
    return {**record.get("planned", {}), **rows}  # earlier versions noted no plan


def recipe_of_run(record: Json) -> CacheRecipe:
    """The recipe that a run followed.

    Raises:
        UserError: this version of ediffi no longer takes that recipe.
    """
    try:
        return resolved_recipe(record["resolved"])
    except ValidationError as error:
        raise UserError(
            f"run {record['run_id']}: its recipe does not fit this version: {error}"
        ) from error


@dataclass
class RecipeFinder:
    """Which recipe a stage belongs to: plans each run's recipe at most once."""

    ledger: Ledger
    runs: Sequence[Json] = ()
    refusals: dict[str, str] = field(default_factory=dict)  # run id -> why it could not be planned
    _plans: dict[str, tuple[CacheRecipe, dict[str, PlannedStage]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.runs = self.runs or self.ledger.runs()

    def recipe_for(self, found: Found) -> CacheRecipe:
        """The recipe whose plan has this very stage; the run that made it is asked first.

        Raises:
            UserError: no run of the store has such a recipe, as what it reads stands today.
        """
        maker = _made_by(found.record.directory)
        for record in sorted(self.runs, key=lambda one: one["run_id"] != maker):
            recipe, planned = self._planned(record)
            if found.name in planned and planned[found.name].fingerprint == found.fingerprint:
                assert recipe is not None
                return recipe
        known = "; ".join(f"{run_id}: {why}" for run_id, why in self.refusals.items())
        raise UserError(
            f"{found.address}: no run in {self.ledger.store} has a recipe that still gives "
            "this fingerprint: what it was made from has changed, or the run's record is gone; "
            f"run the recipe again to make what it asks for today{f' ({known})' if known else ''}"
        )

    def _planned(self, record: Json) -> tuple[CacheRecipe | None, dict[str, PlannedStage]]:
        run_id = record["run_id"]
        if run_id in self.refusals:
            return None, {}
        if run_id not in self._plans:
            try:
                recipe = recipe_of_run(record)
                stages = plan(recipe, self.ledger)
            except UserError as error:
                self.refusals[run_id] = str(error)
                return None, {}
            self._plans[run_id] = recipe, {one.name: one for one in stages}
        return self._plans[run_id]


def _made_by(directory: Location) -> str:
    try:
        return json.loads(read_text(directory / CIRCUMSTANCES_FILE))["run_id"]
    except (FileNotFoundError, KeyError, ValueError):
        return ""  # unfinished, or the note is damaged: any recipe that fits will do


def _all(ledger: Ledger) -> Iterator[Found]:
    found = [Found(name=_name(ledger, one), record=one) for one in ledger.records()]
    return iter(sorted(found, key=lambda one: one.address))


def _name(ledger: Ledger, record: StageRecord) -> str:
    parent = record.directory.parent
    is_top = str(parent.parent).rstrip("/") == str(ledger.store).rstrip("/")
    return parent.name if is_top else f"{parent.parent.name}/{parent.name}"


def _begins(found: Found, text: str) -> bool:
    name, _, digits = text.rpartition("/")
    if name not in ("", found.name) or not _FINGERPRINT.fullmatch(digits):
        return False
    return found.fingerprint.startswith(digits)


def _unknown(ledger: Ledger, text: str, everything: Sequence[Found]) -> str:
    names = ", ".join(dict.fromkeys(one.name for one in everything))
    if not names:
        return f"nothing under {ledger.store}: fill it with `ediffi run` or `ediffi embed`"
    return (
        f"no stage or fingerprint {text!r} in {ledger.store}; it has the stages {names}, "
        "whose fingerprints `ediffi cache ls` shows"
    )
