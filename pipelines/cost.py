"""What a run took, stage by stage, and what the store saved it: device-seconds, hours, money.

A device is a GPU where a stage has any, else a CPU. What a run spent stands in its record, failed
attempts included. What a stage took in all its runs is the sum over their records; of runs that
were killed, and of records that do not say it, the receipts know the attempts that succeeded, so
that such figures are lower bounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipelines.caches.lookup import recipe_of_run
from pipelines.errors import UserError
from pipelines.stage import Json, Manifest
from pipelines.store.ledger import Ledger
from pipelines.store.stage_record import StageRecord

DEVICES = ("gpu", "cpu")
SECONDS_PER_HOUR = 3600
# Stages of ours whose units several workers do together; of a user's own the records say it.
GANG_STAGES = ("base", "experts", "super_resolution", "super_resolution_experts")
MAX_UNITS_TOLD = 64  # of a stage with more units, one by one they tell nothing


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What one worker of a stage holds, and how many do one unit together."""

    device: str = "cpu"  # gpu | cpu
    num_per_worker: float = 1.0
    num_workers: int = 1
    node_group: str = ""

    @classmethod
    def of(cls, cpus: float, gpus: float, num_workers: int = 1, node_group: str = "") -> Devices:
        device, num = ("gpu", gpus) if gpus else ("cpu", cpus)
        return cls(
            device=device, num_per_worker=num, num_workers=num_workers, node_group=node_group
        )


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """One stage of a run.

    Attributes:
        state: ran | cached | failed.
        node_group: whose nodes do its units; "" is any.
        device_s: device-seconds that this run spent.
        saved_device_s: that it would have spent, had the store not held the work already.
        num_images: that went through the finished stage; of training, that it saw.
        device_s_by_unit: of the attempts that made the units, whoever made them.
        made_by: the run that finished the stage; "" while it is not finished.
        is_lower_bound: whether some figure stands for more.
    """

    stage: str
    state: str
    device: str
    node_group: str = ""
    device_s: float = 0.0
    saved_device_s: float = 0.0
    num_images: int = 0
    device_s_by_unit: Mapping[str, float] = field(default_factory=dict)
    made_by: str = ""
    is_lower_bound: bool = False

    @property
    def device_s_per_thousand_images(self) -> float:
        """Of all that the stage took, this run's share and what was there; 0 if nothing counts."""
        whole = self.device_s + self.saved_device_s
        return 1000 * whole / self.num_images if self.num_images else 0.0


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """A run, stage by stage."""

    run_id: str
    state: str
    stages: tuple[StageCost, ...]

    def device_hours(self, device: str) -> float:
        """Spent by this run."""
        return self._hours(device, "device_s")

    def saved_device_hours(self, device: str) -> float:
        """Not spent, because the store held the work."""
        return self._hours(device, "saved_device_s")

    def money(self, prices: Mapping[str, float]) -> float:
        """What was spent, at prices of an hour of its device by stage."""
        return sum(
            prices.get(one.stage, 0.0) * one.device_s / SECONDS_PER_HOUR for one in self.stages
        )

    def saved_money(self, prices: Mapping[str, float]) -> float:
        """What was not spent, because the store held the work."""
        return sum(
            prices.get(one.stage, 0.0) * one.saved_device_s / SECONDS_PER_HOUR
            for one in self.stages
        )

    def metrics(self) -> dict[str, float]:
        """For MLflow's parent run and for comparing runs: the same names in every run."""
        return {
            **{f"cost/device_hours_{name}": round(self.device_hours(name), 6) for name in DEVICES},
            **{
                f"cost/saved_device_hours_{name}": round(self.saved_device_hours(name), 6)
                for name in DEVICES
            },
        }

    def _hours(self, device: str, what: str) -> float:
        found = (getattr(one, what) for one in self.stages if one.device == device)
        return sum(found) / SECONDS_PER_HOUR


def cost_of_run(ledger: Ledger, record: Json) -> RunCost:
    """What a run took, from its record, those of other runs, and the receipts.

    Args:
        record: of the run, as in `runs/<run_id>.json`; it may be under way.
    """
    history = _History(ledger)
    stages = (_stage_cost(history, record, row) for row in record["stages"])
    return RunCost(run_id=record["run_id"], state=record["state"], stages=tuple(stages))


def _stage_cost(history: _History, record: Json, row: Json) -> StageCost:
    stage, state = row["name"], row["state"]
    stage_record = history.ledger.stage(stage, row["fingerprint"])
    manifest = stage_record.manifest() if stage_record.is_complete else None
    devices = history.devices(record, row)
    by_unit = history.by_unit(stage_record, manifest, devices)
    spent = _spent(row, devices)
    if spent is None:  # the record is of a time when this was not counted
        spent = 0.0 if state == "cached" else _of_receipts(manifest, devices)
    if state == "cached":
        saved, is_bound = history.whole(row, manifest, devices)
    else:
        saved = max(_of_receipts(manifest, devices) - spent, 0.0)
        is_bound = "worker_seconds" not in row or saved > 0
    return StageCost(
        stage=stage,
        state=state,
        device=devices.device,
        node_group=devices.node_group,
        device_s=spent,
        saved_device_s=saved,
        num_images=_num_images(manifest),
        device_s_by_unit=by_unit,
        made_by=manifest.run_id if manifest is not None else "",
        is_lower_bound=is_bound,
    )


def _spent(row: Json, devices: Devices) -> float | None:
    """Device-seconds of a row; None if it does not count them."""
    if "worker_seconds" not in row:
        return None
    return float(row["worker_seconds"]) * devices.num_per_worker


def _of_receipts(manifest: Manifest | None, devices: Devices) -> float:
    """Of the attempts that succeeded; 0 while the stage is not finished."""
    seconds = manifest.seconds if manifest is not None else 0.0
    return seconds * devices.num_workers * devices.num_per_worker


def _num_images(manifest: Manifest | None) -> int:
    if manifest is None:
        return 0
    return manifest.totals.num_in or manifest.totals.num_out


class _History:
    """What all runs of a store say of a stage; their records are read once, when first asked."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._records: list[Json] | None = None
        self._resources: dict[tuple[str, str], Devices | None] = {}

    def records(self) -> Sequence[Json]:
        if self._records is None:
            self._records = self.ledger.runs()
        return self._records

    def whole(self, row: Json, manifest: Manifest | None, devices: Devices) -> tuple[float, bool]:
        """What the stage took in all runs, and whether it may have been more."""
        least = _of_receipts(manifest, devices)
        counted = [_spent(other, devices) for other in self._rows(row)]
        total = sum(one for one in counted if one is not None)
        return max(least, total), total < least or None in counted

    def _rows(self, row: Json) -> Iterator[Json]:
        """Rows of runs that worked on the same stage at the same fingerprint."""
        for record in self.records():
            for other in record["stages"]:
                is_same = (other["name"], other["fingerprint"]) == (row["name"], row["fingerprint"])
                if is_same and other["state"] != "cached":
                    yield other

    def devices(self, record: Json, row: Json) -> Devices:
        """What its workers held: where it ran by the record of who made it, else by its recipe."""
        rows = [row] if row["state"] != "cached" else [*self._rows(row), row]
        gang = self._of_recipe(record, row["name"]) or Devices()
        for one in rows:
            if "worker_seconds" in one and "cpus" in one:
                num_workers = one.get("num_workers", gang.num_workers)
                return Devices.of(one["cpus"], one["gpus"], num_workers, gang.node_group)
        return gang

    def _of_recipe(self, record: Json, stage: str) -> Devices | None:
        """As the run's recipe has it; None if this version cannot read that recipe."""
        key = (record["run_id"], stage)
        if key not in self._resources:
            try:
                resources = recipe_of_run(record).resources_of(stage)
                is_gang = stage.partition("/")[0] in GANG_STAGES
                num_workers = resources.num_workers if is_gang else 1
                found = Devices.of(
                    resources.cpus, resources.gpus, num_workers, resources.node_group
                )
            except UserError:
                found = None
            self._resources[key] = found
        return self._resources[key]

    def by_unit(
        self, record: StageRecord, manifest: Manifest | None, devices: Devices
    ) -> dict[str, float]:
        """Device-seconds of each unit that is done, such as an expert; {} of very many."""
        if manifest is None or not 1 < manifest.num_units <= MAX_UNITS_TOLD:
            return {}
        each = devices.num_workers * devices.num_per_worker
        receipts = (record.receipt(unit) for unit in sorted(record.done_units()))
        return {one.unit: one.seconds * each for one in receipts if one is not None}
