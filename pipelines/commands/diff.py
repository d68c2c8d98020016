"""`ediffi cache diff`: two runs, or two stages, side by side."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping
from itertools import islice

from pipelines.caches.diff import (
    SampleChange,
    TensorDifference,
    compare_units,
    compare_values,
    pair_stages,
    resolve,
    sample_changes,
    settings_that_differ,
)
from pipelines.caches.lookup import Found
from pipelines.stage import Json, Receipt
from pipelines.store.ledger import Ledger


def diff(options: Namespace) -> int:
    """Compare two runs or two stages: settings, units, and on request samples and numbers."""
    ledger = Ledger.checked(options.store)
    before, after = resolve(ledger, options.before), resolve(ledger, options.after)
    for old, new in pair_stages(before, after):
        row = _difference(options, old, new)
        if options.json:
            print(json.dumps(row))
        else:
            print("\n".join(_difference_lines(row)))
    return 0


def _difference(options: Namespace, old: Found, new: Found) -> dict[str, Json]:
    units = compare_units(old, new)
    row: dict[str, Json] = {
        "before": old.address,
        "after": new.address,
        "settings": settings_that_differ(old, new),
        "units": dict(units.counts),
        "first": [
            {"unit": one.unit, "kind": one.kind, "why": one.why, **_sizes(one.before, one.after)}
            for one in units.first
        ],
    }
    if options.samples:
        first = islice(sample_changes(old, new), options.samples)
        row["samples"] = [_sample(one) for one in first]
    if options.values:
        values = compare_values(sample_changes(old, new), options.values)
        row["values"] = {name: _numbers(one) for name, one in values.items()}
    return row


def _sizes(before: Receipt | None, after: Receipt | None) -> dict[str, int]:
    return {
        "num_before": before.num_out if before is not None else 0,
        "num_after": after.num_out if after is not None else 0,
    }


def _sample(change: SampleChange) -> Json:
    return {
        "unit": change.unit,
        "key": change.key,
        "kind": change.kind,
        "members": list(change.extensions),
    }


def _numbers(one: TensorDifference) -> Json:
    return {
        "num_compared": one.num_compared,
        "num_other_shape": one.num_other_shape,
        "max_abs": one.max_abs,
        "mean_cosine": one.mean_cosine,
        "min_cosine": one.min_cosine,
    }


def _difference_lines(row: Mapping[str, Json]) -> Iterator[str]:
    yield f"{row['before']} -> {row['after']}"
    yield from (f"  setting {line}" for line in row["settings"])
    order = ("same", "changed", "added", "removed")
    counts = (f"{row['units'][kind]:,} {kind}" for kind in order if row["units"].get(kind))
    yield f"  units   {', '.join(counts) or 'none'}"
    for one in row["first"]:
        yield f"  {one['kind']:<8}{one['unit']}{': ' if one['why'] else ''}{one['why']}"
    for one in row.get("samples", ()):
        yield f"  sample  {one['unit']} {one['key']}: {one['kind']} {', '.join(one['members'])}"
    for name, one in row.get("values", {}).items():
        yield (
            f"  values  {name}: {one['num_compared']} compared, max abs {one['max_abs']:.3g}, "
            f"cosine mean {one['mean_cosine']:.6f} min {one['min_cosine']:.6f}, "
            f"{one['num_other_shape']} of another shape"
        )
