"""Ingest of webdataset tars made elsewhere: verified, and left where they lie."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pipelines.errors import UserError
from pipelines.fingerprint import file_sha256
from pipelines.stage import File, Json, Manifest, Outcome, Receipt, Unit, Workspace
from pipelines.stages.rejects import Rejection, Tally, check_budget
from pipelines.stages.source_list import SPLITS, is_safe_key

if TYPE_CHECKING:
    from pipelines.recipe import ReadyShards

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")


@dataclass(frozen=True, kw_only=True)
class AdoptShards:
    """Verify webdataset tars made elsewhere. Sound ones stay where they lie, nothing is copied.

    A tar with samples that no later stage could use is copied without them; so is one whose
    captions stand only in its JSON members, with the `.txt` members that later stages read.
    """

    config: ReadyShards

    name: ClassVar[str] = "ingest"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ()
    gang: ClassVar[bool] = False

    def identity(self) -> Json:
        """Name, size and time of every tar: reading them all would be the stage's own work."""
        return {
            "source": "shards",
            **{
                split: [
                    [path.name, path.stat().st_size, path.stat().st_mtime_ns]
                    for path in self._paths(split)
                ]
                for split in SPLITS
            },
        }

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        """One unit per tar. Raises UserError for a pattern that matches none."""
        units = []
        for split in SPLITS:
            paths = self._paths(split)
            if not paths:
                pattern = Path(getattr(self.config, split)).absolute()
                raise UserError(f"data.{split}: no .tar file matches {pattern}")
            units += [
                Unit(
                    id=f"{split.replace('_', '-')}-{index:05d}",
                    arguments={"split": split, "path": str(path)},
                )
                for index, path in enumerate(paths)
            ]
        return units

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        """Read one tar through. Raises UserError if it is torn or unsafe."""
        from ediffi.shards import ShardError, read_shard

        path, tally = Path(unit.arguments["path"]), Tally()
        is_sound = True
        try:
            for key, members in read_shard(path):
                mended = _mended(key, members)
                tally.count(key, mended if isinstance(mended, Rejection) else None)
                is_sound = is_sound and mended is members
            if is_sound:
                num_bytes = path.stat().st_size
                file = File(path=str(path), sha256=file_sha256(path), num_bytes=num_bytes)
                return tally.outcome(unit, adopted=(file,))
            _write_mended(path, workspace.scratch / f"{unit.id}.tar")
        except ShardError as error:
            raise UserError(f"data.{unit.arguments['split']}: {error}") from error
        return tally.outcome(unit, files=(f"{unit.id}.tar",))

    def check(self, receipts: Sequence[Receipt]) -> None:
        """Raise StageFailed if too many samples were rejected, see `check_budget`."""
        check_budget(receipts, self.config.max_rejects_fraction)

    def _paths(self, split: str) -> list[Path]:
        found = (Path(name).absolute() for name in glob(getattr(self.config, split)))
        return sorted(path for path in found if path.suffix == ".tar")


def _write_mended(source: Path, target: Path) -> None:
    from ediffi.shards import ShardWriter, read_shard

    with ShardWriter(target) as writer:
        for key, members in read_shard(source):
            mended = _mended(key, members)
            if not isinstance(mended, Rejection):
                writer.write(key, mended)


def _mended(key: str, members: Mapping[str, bytes]) -> Mapping[str, bytes] | Rejection:
    """The same members if they are fit for later stages, else mended ones, else why not."""
    from ediffi.shards import ImageError, decode_image

    if not is_safe_key(key):
        return Rejection(reason="key_invalid", message=f"key {key!r}")
    picture = next((members[name] for name in IMAGE_EXTENSIONS if name in members), None)
    if picture is None:
        return Rejection(reason="image_missing", message=f"members: {', '.join(members)}")
    try:
        caption = members["txt"].decode() if "txt" in members else _json_caption(members)
    except ValueError as error:  # not UTF-8, or not JSON
        return Rejection(reason="caption_invalid", message=str(error))
    if caption is None:
        return Rejection(reason="caption_missing", message="neither .txt nor .json has it")
    if "\0" in caption or not caption.strip():
        return Rejection(reason="caption_invalid" if "\0" in caption else "caption_empty")
    try:
        decode_image(picture)
    except ImageError as error:
        return Rejection.of_image(error)
    return members if "txt" in members else {**members, "txt": caption.encode()}


def _json_caption(members: Mapping[str, bytes]) -> str | None:
    about = json.loads(members.get("json", b"{}"))
    caption = about.get("caption") if isinstance(about, dict) else None
    return caption if isinstance(caption, str) else None
