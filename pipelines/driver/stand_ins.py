"""Units that failed for good and that something else stands in for: the base for an expert.

A stage of experts may be finished when only some of them are trained, if its recipe says how many
are enough. The others get receipts that say so: they hold no files, and count as rejected. Such a
stage serves no recipe that wants more; a run that does then trains what is lacking.
"""

from __future__ import annotations

from pipelines.stage import Manifest, Receipt, Stage

STAND_IN = "stand_in"  # the reason under which they are counted as rejected


def stand_ins_of(manifest: Manifest) -> list[str]:
    """Units of a finished stage that something else stands in for, in their order."""
    if not manifest.totals.rejects.get(STAND_IN):
        return []
    return [receipt.unit for receipt in manifest.receipts if is_stand_in(receipt)]


def is_stand_in(receipt: Receipt) -> bool:
    return STAND_IN in receipt.rejects


def least_units(stage: Stage, num_units: int) -> int:
    """How many units must be done for the stage to be finished."""
    wanted = getattr(stage, "min_success", "all")
    return num_units if wanted == "all" else min(int(wanted), num_units)


def shortfall(stage: Stage, manifest: Manifest) -> str:
    """Why a finished stage is not enough for this recipe; "" if it is."""
    num_stand_ins = manifest.totals.rejects.get(STAND_IN, 0)
    num_done, least = manifest.num_units - num_stand_ins, least_units(stage, manifest.num_units)
    if num_done >= least:
        return ""
    units = ", ".join(stand_ins_of(manifest))
    return (
        f"{num_done} of {manifest.num_units} units are done, {least} are asked for: {units} failed "
        "and something else stands in"
    )
