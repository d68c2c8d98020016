"""What is to be done of a stage: its units as tasks, and how it is completed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.driver.stage_state import StageState
from pipelines.driver.stand_ins import STAND_IN, is_stand_in, least_units, shortfall
from pipelines.errors import UserError
from pipelines.masking import mask
from pipelines.planning import PlannedStage, contents_of, describe
from pipelines.stage import Manifest, Outcome, Receipt, Unit
from pipelines.stages.custom import Custom
from pipelines.store import lease
from pipelines.store.fingerprint import unit_key
from pipelines.store.ledger import Ledger
from pipelines.store.outages import as_retryable
from pipelines.store.stage_names import check_unit_id
from pipelines.worker.execute import Task


@dataclass(kw_only=True)
class StageWork:
    """Looks at stages, and writes what belongs to them as a whole.

    Attributes:
        retry: by stage, units to do again although they have a receipt.
        manifests: of the stages that are finished, by name; filled as the run goes on.
    """

    ledger: Ledger
    run_id: str
    retry: Mapping[str, frozenset[str]]
    manifests: dict[str, Manifest] = field(default_factory=dict)

    def inputs(self, planned: PlannedStage) -> dict[str, Manifest]:
        return {name: self.manifests[name] for name in planned.inputs}

    def contents(self, planned: PlannedStage) -> dict[str, str]:
        return contents_of(planned.inputs, self.manifests)

    def found(self, planned: PlannedStage) -> Manifest | None:
        """The stage's manifest, if it stands for these very inputs and nothing must be redone."""
        if planned.name in self.retry or not planned.record.is_complete:
            return None
        manifest = planned.record.manifest()
        is_same = manifest.input_contents == self.contents(planned)
        return manifest if is_same and not shortfall(planned.stage, manifest) else None

    def open(self, state: StageState) -> None:
        """List the units of a stage that is ours now: those that are done, and those to do."""
        planned = state.planned
        trusted = planned.record.open(
            describe(planned.stage, planned.inputs), self.contents(planned)
        )
        done = planned.record.done_units()
        if hasattr(planned.stage, STAND_IN):
            done -= self._forgotten(planned, done)
        state.num_units, state.plan_digest = self._listing(planned)
        state.pending = self._pending(state, done, trusted)

    def _forgotten(self, planned: PlannedStage, done: set[str]) -> set[str]:
        """Units that had a stand-in, and now have nothing: they are tried again."""
        receipts = [planned.record.receipt(unit) for unit in sorted(done)]
        found = {one.unit for one in receipts if one is not None and is_stand_in(one)}
        for unit in found:
            planned.record.forget(unit)
        return found

    def put_stand_ins(self, state: StageState) -> bool:
        """Give units that failed for good their stand-ins, if enough of the others are done."""
        stage: Any = state.planned.stage
        if not hasattr(stage, STAND_IN) or not state.num_done:
            return False
        if state.is_cut_short or state.num_done < least_units(stage, state.num_units):
            return False
        for unit, message in state.failures.items():
            state.planned.record.publish(
                Unit(id=unit, key=f"{STAND_IN}:{stage.stand_in}"),
                Outcome(rejects={STAND_IN: [unit]}, facts={STAND_IN: stage.stand_in}),
                Path(),  # there are no files
                seconds=0.0,
                attempt=state.resources.attempts,
                reason=mask(message),
                token=state.token,
            )
        return True

    def units(self, planned: PlannedStage) -> Iterator[Unit]:
        """The stage's units; those without a key of their own belong to these input contents.

        Raises:
            UserError: an id cannot be the name of a file.
        """
        key = self._key(planned)
        for unit in planned.stage.plan(self.inputs(planned)):
            check_unit_id(planned.name, unit.id)
            yield unit if unit.key else replace(unit, key=key)

    def _key(self, planned: PlannedStage) -> str:
        """Of units that have none of their own."""
        return unit_key(planned.fingerprint, inputs=self.contents(planned))

    def _listing(self, planned: PlannedStage) -> tuple[int, str]:
        """How many units there are, and a digest of their ids in their order.

        Raises:
            UserError: two have the same id.
        """
        seen: set[str] = set()
        digest = hashlib.sha256()
        for unit in self.units(planned):
            if unit.id in seen:
                raise UserError(
                    f"{planned.name}: plan: each unit must have an id of its own, but two have "
                    f"{unit.id!r}"
                )
            seen.add(unit.id)
            digest.update(f"{unit.id}\n".encode())
        return len(seen), digest.hexdigest()

    def _check_plan(self, state: StageState) -> None:
        """Raise UserError if a stage of the user's own lists other units than at its beginning."""
        if not isinstance(state.planned.stage, Custom):
            return
        if self._listing(state.planned) != (state.num_units, state.plan_digest):
            raise UserError(
                f"custom_stages.{state.name}: plan must list the same units in the same order each "
                "time it is asked, but lists others now than when the stage was begun; let it "
                "depend on config and inputs alone"
            )

    def _pending(self, state: StageState, done: set[str], trusted: bool) -> Iterator[Task]:
        """Tasks for the units that have no receipt, or one that no longer holds."""
        record = state.planned.record
        retry = self.retry.get(state.name, frozenset())
        for unit in self.units(state.planned):
            if unit.id in retry:
                yield replace(self.task(state, unit), is_retry=True)
                continue
            if unit.id in done:
                receipt = None if trusted else record.receipt(unit.id)
                if trusted or (receipt is not None and receipt.key == unit.key):
                    state.num_kept += 1
                    state.num_done += 1
                    continue
            yield self.task(state, unit)

    def task(self, state: StageState, unit: Unit) -> Task:
        planned = state.planned
        return Task(
            store=str(self.ledger.store),
            stage=planned.stage,
            fingerprint=planned.fingerprint,
            inputs=planned.inputs,
            unit=unit,
            run_id=self.run_id,
            device="cuda" if state.resources.gpus else "cpu",
            earlier=planned.earlier,
            token=state.token,
        )

    def amend(self, state: StageState) -> bool:
        """Queue the units that the stage wants done again now that it can see all of them."""
        amend = getattr(state.planned.stage, "amend", None)
        if amend is None:
            return False
        self._check_plan(state)
        record, key = state.planned.record, self._key(state.planned)
        units = amend(self._receipts(state.planned), record.directory)
        if units:
            lease.check(record.directory, state.token)
        for unit in units:
            check_unit_id(state.name, unit.id)
            record.forget(unit.id)
            state.queue.append(self.task(state, unit if unit.key else replace(unit, key=key)))
            state.num_done -= 1
        return bool(units)

    def complete(self, state: StageState) -> Manifest:
        """Let the stage judge its receipts, and write its manifest."""
        planned = state.planned
        self._check_plan(state)
        check = getattr(planned.stage, "check", None)
        if check is not None:
            check(self._receipts(planned))
        return planned.record.complete(
            state.name,
            describe(planned.stage, planned.inputs),
            planned.inputs,
            self.contents(planned),
            (unit.id for unit in self.units(planned)),
            self.run_id,
            token=state.token,
        )

    def _receipts(self, planned: PlannedStage) -> Iterator[Receipt]:
        for unit in self.units(planned):
            with as_retryable(self.ledger.store, f"{planned.name}: reading receipts"):
                receipt = planned.record.demand_receipt(unit.id)
            yield receipt
