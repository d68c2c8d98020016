"""What a run would do in a stage, unit by unit: keep, take over, or do, and why."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from pipelines.planning import PlannedStage, contents_of
from pipelines.stage import RECEIPTS_FILE, Manifest, Unit
from pipelines.stages.inputs import NULL_UNIT
from pipelines.store.fingerprint import changed_parts, unit_key
from pipelines.store.ledger import Ledger
from pipelines.store.stage_record import StageRecord

NUM_UNITS_SHOWN = 5  # that must be done, with the reason


@dataclass
class Forecast:
    """Units of a stage that is not finished, by what a run would do with them.

    Attributes:
        num_samples_to_do: in units to do, as far as their stage knows.
        num_unsized: units to do whose samples the stage cannot count beforehand.
        first: some units to do, with what changed; "" if nothing of that name was done before.
    """

    num_kept: int = 0
    num_taken_over: int = 0
    num_to_do: int = 0
    num_samples_to_do: int = 0
    num_unsized: int = 0
    first: list[tuple[str, str]] = field(default_factory=list)

    def add(self, unit: Unit, why: str, num_samples: int | None) -> None:
        self.num_to_do += 1
        if len(self.first) < NUM_UNITS_SHOWN:
            self.first.append((unit.id, why))
        if num_samples is None:
            self.num_unsized += 1
        else:
            self.num_samples_to_do += num_samples


def forecast(
    planned: PlannedStage, manifests: Mapping[str, Manifest], ledger: Ledger, *, shard_images: int
) -> Forecast:
    """Decide for every unit what the runner would: by its receipt, or its key.

    Args:
        manifests: of the stages it needs, all finished.
        shard_images: rows that ingest puts in a shard; 0 if its shards are made elsewhere.
    """
    found = Forecast()
    inputs = {name: manifests[name] for name in planned.inputs}
    record, contents = planned.record, contents_of(planned.inputs, inputs)
    trusted, keys = set[str](), dict[str, str]()
    if record.is_trusted(contents):
        trusted = record.done_units()
    else:
        keys = dict(_keys(record))
    earlier = [dict(_keys(ledger.stage(planned.name, address))) for address in planned.earlier]
    own = unit_key(planned.fingerprint, inputs=contents)
    for unit in planned.stage.plan(inputs):
        unit = unit if unit.key else replace(unit, key=own)
        before = [found_key for one in (keys, *earlier) if (found_key := one.get(unit.id))]
        if unit.id in trusted or keys.get(unit.id) == unit.key:
            found.num_kept += 1
        elif unit.key in before:
            found.num_taken_over += 1
        else:
            parts = changed_parts(before[0], unit.key) if before else []
            num_samples = samples_in(planned.name, unit, shard_images)
            found.add(unit, f"{', '.join(parts)} changed" if parts else "", num_samples)
    return found


def _keys(record: StageRecord) -> Iterator[tuple[str, str]]:
    """(unit, key) of every receipt; of a finished stage from the one file that gathers them."""
    if record.is_complete:
        with (record.directory / RECEIPTS_FILE).open() as stream:
            for line in stream:
                receipt = json.loads(line)
                yield receipt["unit"], receipt["key"]
        return
    for unit in record.done_units():
        receipt = record.receipt(unit)
        if receipt is not None:
            yield unit, receipt.key


def samples_in(stage: str, unit: Unit, shard_images: int) -> int | None:
    """Samples that a unit starts from, as its own arguments tell; None if they do not.

    Arguments of other stages than these two, such as of a user's own, mean what they like.
    """
    if stage.partition("/")[0] not in ("ingest", "embed"):
        return None
    if unit.id == NULL_UNIT:
        return 0
    if "num_samples" in unit.arguments:
        return int(unit.arguments["num_samples"])
    if "stop" in unit.arguments and shard_images:
        # the rows in between may belong to the other split, so that this is the most it can be
        return min(shard_images, int(unit.arguments["stop"]) - int(unit.arguments["start"]))
    return None
