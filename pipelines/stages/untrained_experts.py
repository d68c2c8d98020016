"""Experts that could not be trained, in the ensemble: its record has them, at the base's weights.

Their own files are left out. So nobody opens such an ensemble as if it were whole: without a word
to let the base stand in (`missing_experts="base"`), `ediffi.load` refuses it and names them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from ediffi.noise import NoiseInterval, SigmaDistribution
from pipelines.driver.stand_ins import stand_ins_of
from pipelines.recipe_sections.training import Experts
from pipelines.stage import Manifest

FACT = "stand_ins"  # in the receipt of `assemble`: which experts the base stands in for


def untrained(
    manifest: Manifest, experts: Experts, distribution: SigmaDistribution
) -> dict[str, NoiseInterval]:
    """The experts of a finished stage that something stands in for, with what they would serve."""
    names = stand_ins_of(manifest)
    intervals = experts.intervals(distribution) if names else {}
    return {name: intervals[name] for name in names}


def make_stand_ins(
    folder: Path, parent: Path, lacking: Mapping[str, NoiseInterval]
) -> dict[str, Path]:
    """Snapshots of the parent that say they serve those intervals, by expert name."""
    from ediffi.snapshot import RECORD_NAME, WEIGHTS_NAME

    made = {}
    for name, interval in lacking.items():
        place = folder / name
        place.mkdir(parents=True)
        shutil.copyfile(parent / WEIGHTS_NAME, place / WEIGHTS_NAME)
        record = json.loads((parent / RECORD_NAME).read_text())
        (place / RECORD_NAME).write_text(json.dumps({**record, "interval": interval.to_json()}))
        made[name] = place
    return made


def leave_out(directory: Path, names: Mapping[str, NoiseInterval]) -> None:
    """Remove the weights of stand-ins from an ensemble directory; its record keeps their names."""
    for name in names:
        (directory / f"{name}.safetensors").unlink()


def missing_experts(assemble: Manifest) -> Literal["error", "base"]:
    """What to tell `ediffi.load` of an assembled ensemble: `base` if it must stand in somewhere."""
    return "base" if any(receipt.facts.get(FACT) for receipt in assemble.receipts) else "error"
