"""`ediffi ema`: another width of average, out of those that training stored."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

from pipelines.errors import UserError

# Above this the weights are visibly those of another average; see docs/training.md.
_ROUGH = 0.05


def ema_options(verb: ArgumentParser) -> None:
    verb.add_argument("snapshot", type=Path, help="a snapshot directory with a power_ema folder")
    verb.add_argument(
        "--std",
        type=float,
        required=True,
        help="relative width of the average: its standard deviation over the images seen",
    )
    verb.add_argument(
        "--images",
        type=int,
        default=0,
        metavar="N",
        help="as it was after N images, one of the stored times (the last)",
    )
    verb.add_argument("--output", type=Path, required=True, help="directory of the new snapshot")
    verb.add_argument("--json", action="store_true", help="print JSON on stdout")


def ema(options: Namespace) -> None:
    """Write a snapshot whose weights are the average of the asked width.

    Raises:
        UserError: nothing was stored, a file is damaged, or width or time cannot be had.
    """
    from ediffi.power_ema import FOLDER_NAME, PowerRecord, reconstruct
    from ediffi.snapshot import read_snapshot, save_snapshot

    source: Path = options.snapshot
    folder = source / FOLDER_NAME
    if options.output.resolve() == source.resolve():
        raise UserError(f"--output must be another directory than {source}")
    try:
        snapshot, _ = read_snapshot(source)
        if not folder.exists():
            raise UserError(
                f"{source} has no {FOLDER_NAME} folder: train with ema_profile: power, and with "
                "ema_snapshot_images for times before the end"
            )
        record = PowerRecord.read(folder)
        images = options.images or record.times[-1]
        made = reconstruct(folder, record, std=options.std, images=images)
        result = replace(snapshot, images_seen=images)
        save_snapshot(options.output, result, made.state)
    except ValueError as error:
        raise UserError(str(error)) from error
    row = {
        "output": str(options.output),
        "std": options.std,
        "images": images,
        "num_stored": made.num_stored,
        "profile_error": made.profile_error,
    }
    print(json.dumps(row) if options.json else _line(row, made.profile_error))


def _line(row: dict[str, object], profile_error: float) -> str:
    text = (
        f"{row['output']}: width {row['std']} at {row['images']:,} images, of {row['num_stored']} "
        f"stored averages; the profile is met to {profile_error:.2%}"
    )
    if profile_error > _ROUGH:
        text += "\nthat is rough: a smaller ema_snapshot_images stores more to make it of"
    return text
