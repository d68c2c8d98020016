"""Names in a stage's folder: those it keeps for itself, and what units and files may be called."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from pipelines.errors import UserError
from pipelines.stage import CIRCUMSTANCES_FILE, RECEIPTS_FILE
from pipelines.store.lease import LEASE_FOLDER

DURABLE_FOLDER = "durable"  # checkpoints and progress of units
_OWN_NAMES = {
    *("identity.json", "manifest.json", CIRCUMSTANCES_FILE, RECEIPTS_FILE),
    *("receipts", DURABLE_FOLDER, LEASE_FOLDER, "quarantine"),
}
_UNIT_ID = re.compile(r"\w[\w.-]*")


def check_unit_id(stage: str, unit_id: object) -> None:
    """Raise UserError for an id that cannot be a file's name."""
    if not isinstance(unit_id, str) or not _UNIT_ID.fullmatch(unit_id):
        raise UserError(
            f"{stage}: plan: the id of a unit must consist of letters, digits, `_`, `.` and `-`, "
            "and not begin with the last two, for receipts and logs are named after it; got "
            f"{unit_id!r}"
        )


def check_file_name(unit_id: str, name: str) -> None:
    """Raise UserError for a file that must not be published under its name."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise UserError(
            f"unit {unit_id}: files of an outcome must lie in workspace.scratch and be named from "
            f"there, got {name!r}"
        )
    if path.parts[0] in _OWN_NAMES:
        raise UserError(
            f"unit {unit_id}: an outcome cannot have a file {name!r}: the store keeps "
            f"{path.parts[0]} of the stage itself there; give the file another name"
        )
