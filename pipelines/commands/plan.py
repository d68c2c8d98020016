"""`ediffi plan`: every stage with hit or miss and why, and what the misses would take."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from pipelines.commands.prices import DEVICES, Prices
from pipelines.cost import Devices
from pipelines.errors import UserError
from pipelines.planning import PlannedStage
from pipelines.planning import plan as make_plan
from pipelines.prediction.cost import Cost, Rate, earlier_rate, predict
from pipelines.prediction.earlier_runs import EarlierRuns
from pipelines.prediction.forecast import Forecast, forecast
from pipelines.prediction.training import (
    TrainingWork,
    training_cost,
    training_rate,
    training_work,
)
from pipelines.recipe import CacheRecipe, ReadyShards
from pipelines.recipe_file import load_any_recipe
from pipelines.recipe_sections.resources import Resources
from pipelines.stage import Json, Manifest
from pipelines.store.ledger import Ledger

INGEST = "ingest"


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """One stage of the plan. `units` is None where its inputs must be finished first."""

    planned: PlannedStage
    units: Forecast | None = None
    cost: Cost | None = None
    note: str = ""  # why units or cost are not known


def plan(options: Namespace) -> None:
    """Print every stage with hit or miss, the reason, and what is to do."""
    prices = Prices.of_options(options)
    recipe = load_any_recipe(options.recipe, options.overrides)
    ledger = Ledger.checked(options.store)
    planned = make_plan(recipe, ledger)
    manifests = {one.name: one.record.manifest() for one in planned if one.is_hit}
    rates: Mapping[str, Rate] = {}
    notes: Mapping[str, str] = {}
    if options.probe and not all(one.is_hit for one in planned):
        from pipelines.prediction.probe import probe

        probed = probe(recipe, planned, manifests, options.probe)
        rates, notes = probed.rates, probed.left_out
    outlooks = look_ahead(recipe, ledger, planned, manifests, rates, notes, prices)
    if options.json:
        print(json.dumps({"recipe": recipe.name, "stages": [_row(one) for one in outlooks]}))
        return
    for one in outlooks:
        print("\n".join(_lines(one)))
    if total := _total(outlooks):
        print(total)


# -- what is to do --------------------------------------------------------------------------------


def look_ahead(
    recipe: CacheRecipe,
    ledger: Ledger,
    planned: Sequence[PlannedStage],
    manifests: Mapping[str, Manifest],
    rates: Mapping[str, Rate],
    notes: Mapping[str, str],
    prices: Prices,
) -> list[Outlook]:
    """For each stage that misses: its units, and what they will take as far as that is known.

    Args:
        manifests: of the stages that are finished.
        rates: from a probe, by stage; what was measured before stands in for those not here.
        notes: by stage, why the probe has no rate for it.
    """
    coming = _Coming(recipe=recipe, manifests=manifests, prices=prices)
    earlier = EarlierRuns(ledger)
    outlooks = []
    for one in planned:
        if one.is_hit:
            outlooks.append(Outlook(planned=one))
            continue
        units, note = coming.forecast(one, ledger)
        if (work := training_work(recipe, one.name)) is not None:
            cost = coming.training_cost(one, work, units, earlier)
            outlooks.append(Outlook(planned=one, units=units, cost=cost, note=note))
            continue
        rate = rates.get(one.name) or earlier_rate(one, earlier)
        cost = coming.cost(one, units, rate) if rate is not None else None
        if one.name == INGEST and rate is not None:
            coming.expect(units, cost, rate)
        note = note or notes.get(one.name, "")
        outlooks.append(Outlook(planned=one, units=units, cost=cost, note=note))
    return outlooks


@dataclass
class _Coming:
    """What is known of stages that are not finished."""

    recipe: CacheRecipe
    manifests: Mapping[str, Manifest]
    prices: Prices
    num_samples: int = 0  # that ingest will hold when it is finished, if that can be told

    def forecast(self, one: PlannedStage, ledger: Ledger) -> tuple[Forecast | None, str]:
        """The units of a stage whose inputs are all there; else None, and what it waits for."""
        waits_for = [name for name in one.inputs if name not in self.manifests]
        if waits_for:
            return None, f"units can be told when {', '.join(waits_for)} is finished"
        data = self.recipe.data
        shard_images = 0 if isinstance(data, ReadyShards) else data.shard_images
        try:
            return forecast(one, self.manifests, ledger, shard_images=shard_images), ""
        except UserError as error:
            return None, str(error)

    def expect(self, units: Forecast | None, cost: Cost | None, rate: Rate) -> None:
        """Note what ingest will hold: what is done already, and what is to come."""
        num_done = units.num_kept + units.num_taken_over if units is not None else 0
        num_in = num_done * rate.num_samples_per_unit + (cost.num_samples if cost else 0)
        self.num_samples = round(num_in * rate.num_out_fraction)

    def cost(self, one: PlannedStage, units: Forecast | None, rate: Rate) -> Cost | None:
        """What is to do; all samples that ingest will have where the units are not known yet."""
        if units is not None and not units.num_to_do:
            return None
        resources = self.recipe.resources_of(one.name)
        num_workers = resources.num_workers if one.stage.gang else 1
        if units is None:
            if not (self.num_samples and rate.num_samples_per_unit):
                return None
            units = Forecast(num_samples_to_do=self.num_samples)
        return predict(
            rate,
            num_units=units.num_to_do,
            num_samples=units.num_samples_to_do,
            num_unsized=units.num_unsized,
            resources=resources,
            num_workers=num_workers,
            prices=self._prices(one.name, resources),
        )

    def training_cost(
        self,
        one: PlannedStage,
        work: TrainingWork,
        units: Forecast | None,
        earlier: EarlierRuns,
    ) -> Cost | None:
        """What training has still to see, whether or not its inputs are there."""
        rate = training_rate(work, one, earlier)
        if rate is None:
            return None
        resources = self.recipe.resources_of(one.name)
        prices = self._prices(one.name, resources)
        return training_cost(work, rate, one, resources, prices, is_fresh=units is None)

    def _prices(self, stage: str, resources: Resources) -> dict[str, float]:
        """Of an hour of the device that the stage counts by, where its units are done."""
        device = Devices.of(resources.cpus, resources.gpus).device
        price = self.prices.of(device, stage, resources.node_group)
        return {} if price is None else {device: price}


# -- words ----------------------------------------------------------------------------------------


def _row(outlook: Outlook) -> Json:
    one, units = outlook.planned, outlook.units
    told = None
    if units is not None:
        told = {
            "kept": units.num_kept,
            "taken_over": units.num_taken_over,
            "to_do": units.num_to_do,
            "first": [{"unit": unit, "why": why} for unit, why in units.first],
        }
    return {
        "name": one.name,
        "fingerprint": one.fingerprint,
        "hit": one.is_hit,
        "reasons": list(one.reasons),
        "path": str(one.record.directory),
        "units": told,
        "cost": asdict(outlook.cost) if outlook.cost is not None else None,
        "note": outlook.note,
    }


def _lines(outlook: Outlook) -> list[str]:
    one = outlook.planned
    verdict = "hit " if one.is_hit else "miss"
    lines = [f"{one.name:<18} {verdict}  {one.fingerprint}  {'; '.join(one.reasons)}".rstrip()]
    if outlook.units is not None:
        lines.append(f"{'':<18} {_units(outlook.units)}")
    if outlook.cost is not None:
        lines.append(f"{'':<18} {_cost(outlook.cost)}  ({outlook.cost.source})")
    if outlook.note:
        lines.append(f"{'':<18} {outlook.note}")
    return lines


def _units(units: Forecast) -> str:
    words = []
    if units.num_kept:
        words.append(f"{units.num_kept:,} kept")
    if units.num_taken_over:
        words.append(f"{units.num_taken_over:,} taken over")
    words.append(f"{units.num_to_do:,} to do")
    shown = ", ".join(f"{unit} ({why})" if why else unit for unit, why in units.first)
    more = ", ..." * (units.num_to_do > len(units.first))
    return f"units: {', '.join(words)}{': ' if shown else ''}{shown}{more}"


def _cost(cost: Cost) -> str:
    words = [f"{cost.num_samples:,} samples"] * bool(cost.num_samples)
    words += [human_bytes(cost.num_bytes), f"{cost.device_hours:,.3g} {cost.device}-hours"]
    if cost.seconds is not None:
        words.append(human_time(cost.seconds))
    if cost.money is not None:
        words.append(f"{cost.money:,.2f} at that price")
    return "about " + ", ".join(words)


def _total(outlooks: Sequence[Outlook]) -> str:
    """Sums over all stages that have a prediction; "" if none has."""
    costs = [one.cost for one in outlooks if one.cost is not None]
    if not costs:
        return ""
    hours = {
        device: sum(cost.device_hours for cost in costs if cost.device == device)
        for device in DEVICES
    }
    words = [human_bytes(sum(cost.num_bytes for cost in costs))]
    words += [f"{hours[device]:,.3g} {device}-hours" for device in DEVICES if hours[device]]
    priced = [cost.money for cost in costs if cost.money is not None]
    if priced:
        words.append(f"{sum(priced):,.2f} at that price")
    return f"{'total':<18} about {', '.join(words)}"


def human_time(seconds: float) -> str:
    """`3.2 h`: one figure and the unit that suits it."""
    for unit, unit_s, from_s in (("days", 86400, 172800), ("h", 3600, 3600), ("min", 60, 60)):
        if seconds >= from_s:
            return f"{seconds / unit_s:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def human_bytes(num_bytes: float) -> str:
    """`1.2 GB`: decimal units, as stores bill them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:,.0f} bytes" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"
