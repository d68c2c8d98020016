"""Samples, bytes, device-hours and money of what a plan has still to do.

A rate comes from a probe on this machine, or from what the same stage took before with settings
that cost the same. Without either nothing is predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.cost import SECONDS_PER_HOUR
from pipelines.planning import PlannedStage
from pipelines.prediction.earlier_runs import EarlierRuns
from pipelines.recipe import Resources
from pipelines.stage import Json, Totals
from pipelines.store.stage_record import StageRecord

NUM_UNITS_LOOKED_AT = 100  # of an unfinished stage
# What an encoder costs, and how many bytes a sample takes, hangs on these.
_COSTLY_FIELDS = ("family", "model", "weights", "max_tokens", "compute_dtype", "storage_dtype")


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What one sample, or one unit where no samples are counted, takes.

    Attributes:
        num_samples_per_unit: 0 where the stage counts no samples.
        seconds: of one worker, per sample (per unit where none are counted).
        num_bytes: published, per sample (per unit).
        num_out_fraction: samples that come out for one that goes in.
        source: where this is known from, for people.
        num_at_once: units that were done side by side there; 0 if that is not known.
    """

    num_samples_per_unit: float
    seconds: float
    num_bytes: float
    num_out_fraction: float
    source: str
    num_at_once: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A prediction. Device-hours are of GPUs if the stage takes any, else of CPUs.

    `seconds` is the time until it is done, with as many units side by side as there were before.
    """

    num_samples: int
    num_bytes: int
    device: str  # gpu | cpu
    device_hours: float
    seconds: float | None  # None: nobody knows how many units run side by side
    money: float | None  # None: no price was given
    source: str


def _rate(totals: Totals, seconds: float, source: str, num_at_once: float = 0.0) -> Rate | None:
    """Per sample, or per unit where none are counted; None if nothing was done."""
    num = totals.num_in or totals.num_units
    if not num:
        return None
    return Rate(
        num_samples_per_unit=totals.num_in / totals.num_units if totals.num_in else 0.0,
        seconds=seconds / num,
        num_bytes=totals.num_bytes / num,
        num_out_fraction=totals.num_out / totals.num_in if totals.num_in else 1.0,
        source=source,
        num_at_once=num_at_once,
    )


def earlier_rate(planned: PlannedStage, earlier: EarlierRuns) -> Rate | None:
    """What the stage itself has taken so far, else the newest whose samples cost the same."""
    rate = _rate_so_far(planned.record)
    if rate is not None:
        return rate
    asked = planned.stage.identity()
    for manifest in earlier.ledger.manifests(planned.name):
        if _costs_the_same(manifest.identity["config"], asked):
            source = f"measured by run {manifest.run_id}"
            at_once = earlier.num_at_once(manifest)
            rate = _rate(manifest.totals, manifest.seconds, source, at_once)
            if rate is not None:
                return rate
    return None


def _rate_so_far(record: StageRecord) -> Rate | None:
    """From the first few units that are done."""
    totals, seconds = Totals(), 0.0
    for unit in sorted(record.done_units())[:NUM_UNITS_LOOKED_AT]:
        receipt = record.receipt(unit)
        if receipt is not None and not receipt.taken_from:  # those took their time elsewhere
            totals, seconds = totals.plus(receipt), seconds + receipt.seconds
    return _rate(totals, seconds, f"measured by {totals.num_units} of its own units")


def _costs_the_same(config: Json, asked: Json) -> bool:
    return all(config.get(name) == asked.get(name) for name in _COSTLY_FIELDS)


def predict(
    rate: Rate,
    *,
    num_units: int,
    num_samples: int,
    num_unsized: int,
    resources: Resources,
    num_workers: int,
    prices: Mapping[str, float],
) -> Cost:
    """What the units to do will take.

    Args:
        num_samples: in those units, as far as they are known.
        num_unsized: units whose samples are not known: taken to be as many as in others.
        num_workers: that do one unit together.
        prices: of an hour by device, `gpu` and `cpu`.
    """
    num_samples += round(num_unsized * rate.num_samples_per_unit)
    num = num_samples if rate.num_samples_per_unit else num_units
    device, num_devices = ("gpu", resources.gpus) if resources.gpus else ("cpu", resources.cpus)
    seconds = num * rate.seconds
    hours = seconds * num_devices * num_workers / SECONDS_PER_HOUR
    return Cost(
        num_samples=num_samples,
        num_bytes=round(num * rate.num_bytes),
        device=device,
        device_hours=hours,
        seconds=seconds / rate.num_at_once if rate.num_at_once else None,
        money=hours * prices[device] if device in prices else None,
        source=rate.source,
    )
