"""Ingest: turn addresses, a folder or ready shards into checked shards of pictures and captions.

One unit is one shard, `train-00000.tar` or `held-out-00000.tar`, with members `KEY.png` (at the
recipe's image_px), `KEY.txt` (the caption) and `KEY.json` (where it came from). Every row of the
list ends as a sample or is rejected for exactly one reason; how many rejects are too many is
judged over the whole stage, by `check`. Choosing good pictures is left to whoever makes the list;
the paper filters by CLIP alignment and aesthetic score.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.errors import UserError
from pipelines.stage import Json, Manifest, Outcome, Receipt, Unit, Workspace
from pipelines.stages.adopt import AdoptShards
from pipelines.stages.fetch import Fetched, fetch, local_path
from pipelines.stages.rejects import Rejection, Tally, check_budget
from pipelines.stages.source_list import SPLITS, Row, SourceList

if TYPE_CHECKING:
    from pipelines.recipe import PictureFolder, Recipe, UrlList
    from pipelines.stage import Stage


def ingest_stage(recipe: Recipe) -> Stage:
    """The ingest stage for the recipe's source; its paths no longer depend on the directory."""
    data = recipe.data
    if data.source == "urls":
        lists = {"list": data.list.absolute()}
        return IngestUrls(config=data.model_copy(update=lists), seed=recipe.seed)
    if data.source == "folder":
        places = {"list": data.list.absolute(), "folder": data.folder.absolute()}
        return IngestFolder(config=data.model_copy(update=places), seed=recipe.seed)
    globs = {split: str(Path(getattr(data, split)).absolute()) for split in SPLITS}
    return AdoptShards(config=data.model_copy(update=globs))


# -- sources that make shards ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class IngestUrls:
    """Download the pictures of a list with img2dataset and write them as shards."""

    config: UrlList
    seed: int

    name: ClassVar[str] = "ingest"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ()
    gang: ClassVar[bool] = False

    @property
    def source(self) -> SourceList:
        return _source_list(self.config, self.config.address_column, self.seed)

    def identity(self) -> Json:
        """Not in it: the address prefix, timeouts and threads, which say how, not what."""
        return {"source": "urls", **self.source.identity(), **_shard_identity(self.config)}

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        """One unit per shard. Raises UserError for a list that is absent or unfit."""
        return self.source.units(self.config.shard_images)

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        """Download, decode, resize and write one shard. Raises RetryableError for an outage."""
        downloads = workspace.scratch / "downloads"
        downloads.mkdir()

        def pictures(rows: Sequence[Row]) -> Fetched:
            return fetch(
                rows,
                prefix=self.config.address_prefix,
                folder=self.config.list.absolute().parent,
                timeout_s=self.config.timeout_s,
                threads=self.config.threads,
                scratch=downloads,
            )

        return _ingest(self.source, unit, pictures, self.config, workspace.scratch)

    def check(self, receipts: Sequence[Receipt]) -> None:
        """Raise StageFailed if too many rows were rejected, see `check_budget`."""
        check_budget(receipts, self.config.max_rejects_fraction)


@dataclass(frozen=True, kw_only=True)
class IngestFolder:
    """Write the pictures of a folder, named by a list, as shards."""

    config: PictureFolder
    seed: int

    name: ClassVar[str] = "ingest"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ()
    gang: ClassVar[bool] = False

    @property
    def source(self) -> SourceList:
        return _source_list(self.config, self.config.path_column, self.seed)

    def identity(self) -> Json:
        """The list's bytes and the folder's place stand for the pictures, which are not read."""
        return {
            "source": "folder",
            "folder": str(self.config.folder.absolute()),
            **self.source.identity(),
            **_shard_identity(self.config),
        }

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        """One unit per shard. Raises UserError for a list or folder that is absent or unfit."""
        if not self.config.folder.is_dir():
            raise UserError(f"data.folder: no directory at {self.config.folder.absolute()}")
        return self.source.units(self.config.shard_images)

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        """Decode, resize and write one shard."""

        def pictures(rows: Sequence[Row]) -> Fetched:
            return {row.index: local_path(self.config.folder, str(row.address)) for row in rows}

        return _ingest(self.source, unit, pictures, self.config, workspace.scratch)

    def check(self, receipts: Sequence[Receipt]) -> None:
        """Raise StageFailed if too many rows were rejected, see `check_budget`."""
        check_budget(receipts, self.config.max_rejects_fraction)


def _source_list(config: UrlList | PictureFolder, address_column: str, seed: int) -> SourceList:
    return SourceList(
        path=config.list,
        address_column=address_column,
        caption_column=config.caption_column,
        key_column=config.key_column,
        held_out=config.held_out,
        seed=seed,
    )


def _shard_identity(config: UrlList | PictureFolder) -> dict[str, Json]:
    return {
        "image_px": config.image_px,
        "resize": config.resize,
        "shard_images": config.shard_images,
    }


# -- one shard ------------------------------------------------------------------------------------


def _ingest(
    source: SourceList,
    unit: Unit,
    pictures: Callable[[Sequence[Row]], Fetched],
    config: UrlList | PictureFolder,
    scratch: Path,
) -> Outcome:
    """Write one shard: samples in the order of the list, whichever pictures arrived first."""
    from ediffi.shards import ShardWriter

    rows = list(source.rows(unit))
    fetched = pictures([row for row in rows if row.rejection is None])
    tally = Tally()
    with ShardWriter(scratch / f"{unit.id}.tar") as writer:
        for row in rows:
            members = row.rejection or _members(row, fetched[row.index], config)
            if isinstance(members, Rejection):
                tally.count(row.key or f"row {row.index}", members)
            else:
                writer.write(row.key, members)
                tally.count(row.key, None)
    return tally.outcome(unit, files=(f"{unit.id}.tar",))


def _members(
    row: Row, picture: Path | Rejection, config: UrlList | PictureFolder
) -> dict[str, bytes] | Rejection:
    """Decode and resize one picture; the members of its sample, or what is wrong with it."""
    from ediffi.shards import ImageError, decode_image, fit_image

    if isinstance(picture, Rejection):
        return picture
    try:
        image = decode_image(picture.read_bytes())
    except ImageError as error:
        return Rejection.of_image(error)
    caption = str(row.caption)
    about = {
        **row.columns,
        "caption": caption,
        "url": row.address,
        "width": image.width,
        "height": image.height,
    }
    return {
        "png": _png(fit_image(image, config.image_px, config.resize)),
        "txt": caption.encode(),
        "json": json.dumps(about, ensure_ascii=False, sort_keys=True).encode(),
    }


def _png(image_HWC: Any) -> bytes:
    from PIL import Image

    stream = BytesIO()
    Image.fromarray(image_HWC).save(stream, format="PNG")
    return stream.getvalue()
