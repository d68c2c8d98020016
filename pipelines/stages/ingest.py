"""Ingest: turn addresses, a folder or ready shards into checked shards of pictures and captions.

One unit is one shard, `train-00000.tar` or `held-out-00000.tar`, with members `KEY.png` (at the
recipe's image_px), `KEY.txt` (the caption) and `KEY.json` (where it came from), and an index of it
beside it. Every row of the list ends as a sample or is rejected for exactly one reason; how many
rejects are too many is judged over the whole stage, by `check`. Choosing good pictures is left to
whoever makes the list; the paper filters by CLIP alignment and aesthetic score.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.errors import UserError
from pipelines.stage import Json, Manifest, Outcome, Receipt, Unit, Workspace
from pipelines.stages.ingestion.address_guard import AddressRules
from pipelines.stages.ingestion.adopt import AdoptShards
from pipelines.stages.ingestion.earlier_shard import EarlierShard
from pipelines.stages.ingestion.fetch import Download, FetchSettings, check_outage, fetch
from pipelines.stages.ingestion.picture_files import find_pictures, max_bytes_of
from pipelines.stages.ingestion.rejects import Rejection, Tally, check_budget
from pipelines.stages.ingestion.source_files import absolute
from pipelines.stages.ingestion.source_list import SPLITS, Row, SourceList
from pipelines.store.location import location

if TYPE_CHECKING:
    from pipelines.recipe import CacheRecipe, PictureFolder, UrlList
    from pipelines.stage import Stage

MAX_ADDRESS_CHARACTERS = 2000  # told of a rejected row


def ingest_stage(recipe: CacheRecipe) -> Stage:
    """The ingest stage for the recipe's source; its paths no longer depend on the directory."""
    data = recipe.data
    if data.source == "shards":
        globs = {split: getattr(data, split) for split in SPLITS}
        places = {split: absolute(pattern) for split, pattern in globs.items() if pattern}
        return AdoptShards(config=data.model_copy(update=places))
    places = {"list": absolute(data.list)}
    if data.source == "urls":
        return IngestUrls(config=data.model_copy(update=places), seed=recipe.seed)
    places["folder"] = absolute(data.folder)
    return IngestFolder(config=data.model_copy(update=places), seed=recipe.seed)


# -- sources that make shards ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class IngestUrls:
    """Download the pictures of a list with img2dataset and write them as shards."""

    config: UrlList
    seed: int

    name: ClassVar[str] = "ingest"
    version: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ()
    gang: ClassVar[bool] = False

    @property
    def source(self) -> SourceList:
        return _source_list(self.config, self.config.address_column, self.seed)

    def identity(self) -> Json:
        """Not in it: the address prefix, timeouts, retries, allowed addresses and threads.

        They say how pictures are fetched, not which.
        """
        shards = {**_sample_identity(self.config), "shard_images": self.config.shard_images}
        return {"source": "urls", **self.source.identity(), **shards}

    def plan(self, inputs: Mapping[str, Manifest]) -> Iterable[Unit]:
        """One unit per shard. Raises UserError for a list that is absent or unfit."""
        try:
            AddressRules.parse(self.config.allow_addresses)
        except ValueError as error:
            raise UserError(str(error)) from error
        settings = {"source": "urls", "version": self.version, **_sample_identity(self.config)}
        return self.source.units(self.config.shard_images, settings)

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        """Download, decode, resize and write one shard. Raises RetryableError for an outage.

        A unit that is tried again over its own earlier receipt keeps what that has settled, and
        asks only for what failed for a reason that passes.
        """
        with EarlierShard.of(unit, workspace) as earlier:

            def pictures(rows: Sequence[Row]) -> Download:
                scratch = workspace.scratch / "downloads"
                scratch.mkdir()
                download = fetch(rows, self._fetch_settings(), scratch)
                if earlier.tar is None:  # else: some of the shard was reached before
                    check_outage(download.pictures)
                return download

            return _ingest(self.source, unit, pictures, self.config, workspace, earlier)

    def check(self, receipts: Iterable[Receipt]) -> None:
        """Raise StageFailed if too many rows were rejected, see `check_budget`."""
        check_budget(receipts, self.config.max_rejects_fraction)

    def _fetch_settings(self) -> FetchSettings:
        return FetchSettings(
            prefix=self.config.address_prefix,
            folder=location(self.config.list).parent,
            allow_addresses=self.config.allow_addresses,
            timeout_s=self.config.timeout_s,
            retries=self.config.retries,
            threads=self.config.threads,
            max_bytes=max_bytes_of(self.config.max_picture_mib),
        )


@dataclass(frozen=True, kw_only=True)
class IngestFolder:
    """Write the pictures of a folder, named by a list, as shards."""

    config: PictureFolder
    seed: int

    name: ClassVar[str] = "ingest"
    version: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ()
    gang: ClassVar[bool] = False

    @property
    def source(self) -> SourceList:
        return _source_list(self.config, self.config.path_column, self.seed)

    def identity(self) -> Json:
        """The list's bytes and the folder's place stand for the pictures, which are not looked at.

        So do they in the keys of units: to ask a file system for the time of every picture of a
        large set would take longer than a plan may.
        """
        shards = {**_sample_identity(self.config), "shard_images": self.config.shard_images}
        folder = str(location(self.config.folder))
        return {"source": "folder", "folder": folder, **self.source.identity(), **shards}

    def plan(self, inputs: Mapping[str, Manifest]) -> Iterable[Unit]:
        """One unit per shard. Raises UserError for a list or folder that is absent or unfit."""
        folder = location(self.config.folder)
        if not folder.is_dir():
            raise UserError(f"data.folder: no directory at {folder}")
        settings = {
            "source": "folder",
            "folder": str(folder),
            "version": self.version,
            **_sample_identity(self.config),
        }
        return self.source.units(self.config.shard_images, settings)

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        """Decode, resize and write one shard."""

        def pictures(rows: Sequence[Row]) -> Download:
            scratch = workspace.scratch / "copies"
            scratch.mkdir()
            found = find_pictures(
                rows,
                location(self.config.folder),
                max_bytes=max_bytes_of(self.config.max_picture_mib),
                scratch=scratch,
            )
            return Download(pictures=found, timings={})

        return _ingest(self.source, unit, pictures, self.config, workspace, EarlierShard())

    def check(self, receipts: Iterable[Receipt]) -> None:
        """Raise StageFailed if too many rows were rejected, see `check_budget`."""
        check_budget(receipts, self.config.max_rejects_fraction)


def _source_list(config: UrlList | PictureFolder, address_column: str, seed: int) -> SourceList:
    return SourceList(
        place=location(config.list),
        address_column=address_column,
        caption_column=config.caption_column,
        key_column=config.key_column,
        held_out=config.held_out,
        seed=seed,
    )


def _sample_identity(config: UrlList | PictureFolder) -> dict[str, Json]:
    """What decides a sample beside its row and its picture."""
    return {
        "image_px": config.image_px,
        "resize": config.resize,
        "max_pixels": config.max_pixels,
        "max_picture_mib": config.max_picture_mib,
        "max_caption_characters": config.max_caption_characters,
    }


# -- one shard ------------------------------------------------------------------------------------


def _ingest(
    source: SourceList,
    unit: Unit,
    pictures: Callable[[Sequence[Row]], Download],
    config: UrlList | PictureFolder,
    workspace: Workspace,
    earlier: EarlierShard,
) -> Outcome:
    """Write one shard: samples in the order of the list, whichever pictures arrived first."""
    from ediffi.shards import ShardWriter
    from ediffi.storage.tar_index import write_index

    rows = [(row, row.rejection(config.max_caption_characters)) for row in source.rows(unit)]
    download = pictures(
        [row for row, unfit in rows if unfit is None and not earlier.has_settled(row.key)]
    )
    tally, tar_path = Tally(), workspace.scratch / f"{unit.id}.tar"
    with ShardWriter(tar_path) as writer:
        for row, unfit in rows:
            members = unfit or earlier.settled(row.key)
            if members is None:
                members = _members(row, download.pictures[row.index], config)
            if isinstance(members, Rejection):
                tally.reject(row.key or f"row {row.index}", members, _origin(source, row))
            else:
                writer.write(row.key, members)
                tally.keep(row.key, members["txt"], members["png"])
    index_path = tar_path.with_suffix(".index.json")
    write_index(tar_path, index_path)
    files = (tar_path.name, index_path.name, *tally.write_report(unit, workspace.scratch))
    return tally.outcome(unit, files=files, timings=download.timings)


def _members(
    row: Row, picture: Path | Rejection, config: UrlList | PictureFolder
) -> dict[str, bytes] | Rejection:
    """Decode and resize one picture; the members of its sample, or what is wrong with it."""
    from ediffi.shards import ImageError, decode_image, fit_image

    if isinstance(picture, Rejection):
        return picture
    try:
        image = decode_image(picture.read_bytes(), max_pixels=config.max_pixels)
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


def _origin(source: SourceList, row: Row) -> dict[str, Json]:
    """Where a rejected row stands, and what it asked for."""
    address = row.address if isinstance(row.address, str) else repr(row.address)
    return {
        "list": str(source.place),
        "row": row.index,
        "address": address[:MAX_ADDRESS_CHARACTERS],
    }


def _png(image_HWC: Any) -> bytes:
    from PIL import Image

    stream = BytesIO()
    Image.fromarray(image_HWC).save(stream, format="PNG")
    return stream.getvalue()
