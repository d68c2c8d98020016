"""`ediffi cost`: what a run took, stage by stage, and what the store saved it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from pipelines.commands.options import json_option
from pipelines.commands.prices import DEVICES, Prices, price_options
from pipelines.errors import UserError
from pipelines.jobs.submitted import Jobs
from pipelines.store.ledger import Ledger

if TYPE_CHECKING:
    from cluster.profile import Profile
    from pipelines.cost import RunCost, StageCost
    from pipelines.stage import Json


def cost_options(verb: argparse.ArgumentParser) -> None:
    """A run, prices, and `--json`."""
    verb.add_argument("run", nargs="?", default="", help="id of a run, or its beginning; newest")
    price_options(verb)
    json_option(verb)


def cost(options: argparse.Namespace) -> None:
    """Print device-seconds by stage, by expert and by thousand images; hours and money in all."""
    from pipelines.cost import cost_of_run

    prices = Prices.of_options(options)
    ledger = Ledger.checked(options.store)
    record = ledger.run(options.run) if options.run else next(iter(ledger.runs()), None)
    if record is None:
        raise UserError(f"no runs in {ledger.store}: start one with `ediffi run RECIPE`")
    found = cost_of_run(ledger, record)
    is_asked = prices.profile is not None
    if not is_asked:
        prices = replace(prices, profile=_profile_of_run(ledger, record))
    by_stage = _by_stage(found, prices, is_asked=is_asked)
    if options.json:
        print(json.dumps(_document(found, by_stage)))
        return
    print(f"{found.run_id}  {found.state}")
    for one in found.stages:
        print("\n".join(_lines(one)))
    print("\n".join(_totals(found, by_stage)))


def _profile_of_run(ledger: Ledger, record: Json) -> Profile | None:
    """The place that the run's job was sent to, if it was a job and its record is there."""
    from pipelines.commands.schedulers import profile_of

    name = record.get("job", "")
    job = next((one for one in Jobs(ledger).all() if one.job_id == name), None) if name else None
    try:
        return profile_of(job) if job is not None else None
    except UserError as error:  # what the run took can be told without
        print(f"ediffi: no prices: {error}", file=sys.stderr)
        return None


def _by_stage(found: RunCost, prices: Prices, *, is_asked: bool) -> dict[str, float]:
    """What an hour of its device costs, of each stage of which that is known.

    Raises:
        UserError: prices were asked for, and one is not clear.
    """
    priced = {}
    for one in found.stages:
        try:
            price = prices.of(one.device, one.stage, one.node_group)
        except UserError as error:
            if is_asked:
                raise
            print(f"ediffi: {one.stage} has no price: {error}", file=sys.stderr)
            continue
        if price is not None:
            priced[one.stage] = price
    return priced


def _document(found: RunCost, prices: Mapping[str, float]) -> dict[str, object]:
    stages = [
        {**asdict(one), "device_s_per_thousand_images": one.device_s_per_thousand_images}
        for one in found.stages
    ]
    hours = {device: found.device_hours(device) for device in DEVICES}
    saved = {device: found.saved_device_hours(device) for device in DEVICES}
    return {
        "run_id": found.run_id,
        "state": found.state,
        "stages": stages,
        "device_hours": hours,
        "saved_device_hours": saved,
        "prices_per_device_hour": dict(prices),
        "money": found.money(prices) if prices else None,
        "saved_money": found.saved_money(prices) if prices else None,
    }


def _lines(one: StageCost) -> list[str]:
    words = [f"{one.stage:<24} {one.state:<7} {one.device_s:>12,.1f} {one.device}-s"]
    if one.saved_device_s:
        words.append(f"saved {_bound(one)}{one.saved_device_s:,.1f}")
    if one.device_s_per_thousand_images:
        words.append(f"{one.device_s_per_thousand_images:,.3g} a thousand images")
    if one.state == "cached" and one.made_by:
        words.append(f"made by {one.made_by}")
    units = [f"  {unit:<22} {'':<7} {s:>12,.1f}" for unit, s in one.device_s_by_unit.items()]
    return ["  ".join(words), *units]


def _bound(one: StageCost) -> str:
    return "at least " if one.is_lower_bound else ""


def _totals(found: RunCost, prices: Mapping[str, float]) -> list[str]:
    lines = []
    for title, hours, money in (
        ("spent", found.device_hours, found.money(prices)),
        ("saved by the store", found.saved_device_hours, found.saved_money(prices)),
    ):
        words = [f"{hours(device):,.3g} {device}-hours" for device in DEVICES if hours(device)]
        words += [f"{money:,.2f} at that price"] * bool(prices)
        lines.append(f"{title:<24} {', '.join(words) or 'nothing'}")
    return lines
