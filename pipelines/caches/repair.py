"""Making parts of a finished stage again: broken units, and samples that failed in passing."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.caches.lookup import Found, RecipeFinder
from pipelines.caches.verification import IDENTITY_FILE, QUARANTINE_FOLDER, Problem, verify
from pipelines.driver.stand_ins import STAND_IN
from pipelines.errors import Damaged, UserError
from pipelines.stage import Receipt, is_adopted
from pipelines.store.lease import take
from pipelines.store.ledger import Ledger
from pipelines.store.location import Location
from pipelines.store.processes import Owner
from pipelines.store.stage_record import StageRecord

if TYPE_CHECKING:
    from pipelines.recipe import CacheRecipe

INGEST = "ingest"


# -- broken units ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Broken:
    """A stage and what is wrong with it; there is something."""

    found: Found
    problems: Sequence[Problem]

    @property
    def units(self) -> list[str]:
        named = (problem.unit for problem in self.problems)
        return list(dict.fromkeys(unit for unit in named if unit))

    @property
    def has_lost_its_manifest(self) -> bool:
        """Whether the manifest, or the receipts gathered beside it, cannot be trusted."""
        return any(problem.kind == "stage" for problem in self.problems)


@dataclass(frozen=True, kw_only=True)
class Mended:
    """What became of one broken stage: its units, by whether the new bytes equal the old."""

    found: Found
    equal: Sequence[str]
    different: Sequence[str]


def find_broken(stages: Iterable[Found]) -> list[Broken]:
    """Verify stages; those that are not sound, in an order in which they can be made again."""
    broken = []
    for found in stages:
        problems = [one for one in verify(found).problems if not one.is_harmless]
        if problems:
            broken.append(Broken(found=found, problems=problems))
    return sorted(broken, key=lambda one: _depth(one.found, {}))


def _depth(found: Found, known: dict[str, int]) -> int:
    """How many stages, one after another, a stage was made from; 0 if nothing says from what."""
    if found.address not in known:
        known[found.address] = 0  # a damaged store may have circles
        store = found.record.directory.parents[found.name.count("/") + 1]
        try:
            inputs: Mapping[str, str] = found.inputs()
        except Damaged:  # which is one of the problems to mend
            inputs = {}
        depths = (
            _depth(Found(name=name, record=StageRecord(store / name / fingerprint)), known)
            for name, fingerprint in inputs.items()
        )
        known[found.address] = max((depth + 1 for depth in depths), default=0)
    return known[found.address]


def drop_lost_manifests(broken: Iterable[Broken]) -> None:
    """Remove manifests that prove nothing: one alone keeps every recipe from being planned.

    Whoever works on such a stage writes its manifest last, so this takes nothing from them.
    """
    for one in broken:
        if one.has_lost_its_manifest:
            (one.found.record.directory / "manifest.json").unlink(missing_ok=True)


def repair(ledger: Ledger, broken: Broken, finder: RecipeFinder) -> Mended:
    """Put broken files aside, forget their receipts, and make the units again.

    An earlier fingerprint may share the broken bytes, so nothing is taken over from one.

    Raises:
        UserError: no recipe gives this stage any more; nothing was touched.
        RetryableError: another driver works on the stage; nothing was touched.
        StageFailed: a unit could not be made again; its broken files stay in quarantine.
    """
    from pipelines.workflow import run_recipe

    recipe = finder.recipe_for(broken.found)
    record, units, name = broken.found.record, broken.units, broken.found.name
    before = {unit: _digests(_receipt(broken.found, unit)) for unit in units}
    with take(record.directory, Owner.of_this_process("repair")):
        for problem in broken.problems:
            if problem.file == IDENTITY_FILE:  # then every receipt is judged by its key
                (record.directory / IDENTITY_FILE).unlink(missing_ok=True)
            if problem.kind == "changed" and not is_adopted(problem.file):
                _put_aside(record.directory, problem.file)
        for unit in units:
            record.forget(unit)
    run_recipe(recipe, ledger, selected=(name,), retry={name: frozenset(units)})
    after = {unit: _digests(record.receipt(unit)) for unit in units}
    return Mended(
        found=broken.found,
        equal=[unit for unit in units if before[unit] == after[unit]],
        different=[unit for unit in units if before[unit] != after[unit]],
    )


def _receipt(found: Found, unit: str) -> Receipt | None:
    """The unit's receipt, from wherever it is still readable."""
    try:
        if (own := found.record.receipt(unit)) is not None:
            return own
    except (ValueError, KeyError, TypeError) as error:
        print(f"{found.address}: receipt of {unit} is damaged: {error}", file=sys.stderr)
    try:
        return next((one for one in found.receipts() if one.unit == unit), None)
    except (ValueError, KeyError, TypeError):
        return None  # both are damaged: there is nothing to compare with


def _digests(receipt: Receipt | None) -> dict[str, str]:
    return {file.path: file.sha256 for file in receipt.files} if receipt is not None else {}


def _put_aside(directory: Location, name: str) -> None:
    """Move a broken file to quarantine, where nothing reads it; `ediffi cache gc` removes it."""
    source, target = directory / name, directory / QUARANTINE_FOLDER / name
    if isinstance(source, Path) and isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
    elif not isinstance(source, Path) and not isinstance(target, Path):
        source.fs.mv(source.path, target.path)


# -- retries --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Change:
    """One unit before and after a retry."""

    unit: str
    num_before: int
    num_after: int
    rejects_before: Mapping[str, int]
    rejects_after: Mapping[str, int]


@dataclass
class Retry:
    """Units of one stage to do again.

    `rejected` have samples that were left out. With `only_failed` these samples alone are asked for
    again, else the whole units. Units that have no receipt are done as in any run.
    """

    ledger: Ledger
    found: Found
    recipe: CacheRecipe
    rejected: dict[str, Receipt] = field(default_factory=dict)
    only_failed: bool = True

    def run(self) -> None:
        """Do them. Raises StageFailed, as a run does, if the stage still has too many rejects."""
        from pipelines.workflow import run_recipe

        if not self.only_failed:
            with take(self.found.record.directory, Owner.of_this_process("retry")):
                for unit in self.rejected:
                    self.found.record.forget(unit)  # a unit without a receipt keeps nothing of it
        retry = {self.found.name: frozenset(self.rejected)} if self.rejected else None
        run_recipe(self.recipe, self.ledger, selected=(self.found.name,), retry=retry)

    def changes(self) -> Iterator[Change]:
        """What came of it, unit by unit, as far as it came."""
        for unit, before in self.rejected.items():
            after = self.found.record.receipt(unit)
            if after is not None:
                yield Change(
                    unit=unit,
                    num_before=before.num_out,
                    num_after=after.num_out,
                    rejects_before=_counts(before),
                    rejects_after=_counts(after),
                )


def prepare_retry(
    ledger: Ledger, name: str, recipe: CacheRecipe, *, only_failed: bool
) -> list[Retry]:
    """The stages a recipe calls `name`, each with its units to do again.

    Args:
        name: such as `ingest`, or `embed` for all encoders.
        only_failed: ask only for samples whose reason may have passed by now; else whole units
            that rejected anything are done from the beginning.

    Raises:
        UserError: the recipe has no such stage, or nothing of it was ever done.
    """
    from pipelines.planning import plan
    from pipelines.workflow import select

    planned = plan(recipe, ledger)
    retries = []
    for one in select(planned, (name,)):
        if name not in (one.name, one.name.split("/")[0]):
            continue  # only needed by it
        found = Found(name=one.name, record=one.record)
        if not (one.record.directory / "identity.json").exists():
            raise UserError(
                f"{one.name}/{one.fingerprint}: nothing was done yet, so nothing can be retried; "
                "start it with `ediffi run`"
            )
        pattern = _passing(one.name) if only_failed else re.compile(".*")
        rejected = {
            receipt.unit: receipt
            for receipt in found.receipts()
            if any(pattern.fullmatch(reason) for reason in receipt.rejects)
        }
        retries.append(
            Retry(
                ledger=ledger,
                found=found,
                recipe=recipe,
                rejected=rejected,
                only_failed=only_failed,
            )
        )
    return retries


def _passing(stage: str) -> re.Pattern[str]:
    """Reasons for rejects that another attempt may not meet."""
    if stage != INGEST:
        return re.compile(STAND_IN)
    from pipelines.stages.ingestion.fetch import PASSING_REASONS

    return PASSING_REASONS


def _counts(receipt: Receipt) -> dict[str, int]:
    return {reason: len(keys) for reason, keys in receipt.rejects.items()}
