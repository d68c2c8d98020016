"""The `data` section of a recipe: where pictures and captions come from, and what is refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

Fraction = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[Finite, Field(gt=0)]
NonNegative = Annotated[Finite, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
Resize = Literal["center_crop", "pad", "stretch"]


class Section(BaseModel):
    """A part of the recipe: unknown fields are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class HeldOut(Section):
    """Which samples are kept out of training: rows whose `column` is `value`, or a fraction."""

    column: str = ""
    value: str = ""
    fraction: Fraction = 0.05

    @property
    def by_column(self) -> bool:
        return bool(self.column)


class Pictures(Section):
    """What the sources that make shards share."""

    list: str  # parquet or CSV, a path or a URL such as s3://bucket/list.parquet
    caption_column: str = "caption"
    key_column: str = ""  # "": rows are numbered
    held_out: HeldOut = HeldOut()
    image_px: PositiveInt
    resize: Resize = "center_crop"
    shard_images: PositiveInt = 1000
    max_pixels: PositiveInt = 64_000_000
    max_picture_mib: Positive = 64.0
    max_caption_characters: PositiveInt = 10_000
    max_rejects_fraction: Fraction = 0.05


class UrlList(Pictures):
    """A parquet or CSV of addresses and captions, fetched by img2dataset."""

    source: Literal["urls"]
    address_column: str = "url"
    address_prefix: str = ""  # "": relative addresses are files beside the list
    allow_addresses: tuple[str, ...] = ()  # private networks or hosts that may be fetched from
    timeout_s: PositiveInt = 10
    retries: Annotated[int, Field(ge=0)] = 2  # of failures that pass, such as timeouts
    threads: PositiveInt = 16


class PictureFolder(Pictures):
    """A folder of pictures and a parquet or CSV that names each file and its caption."""

    source: Literal["folder"]
    folder: str  # a path or a URL
    path_column: str = "path"


class ReadyShards(Section):
    """webdataset tars made elsewhere, adopted where they lie."""

    source: Literal["shards"]
    train: str  # glob of paths or of a URL such as s3://bucket/shards/*.tar
    held_out: str = ""  # glob; "": none are held out
    image_px: PositiveInt = 64  # pictures are brought to this size when they are read
    resize: Resize = "center_crop"
    max_pixels: PositiveInt = 64_000_000
    max_picture_mib: Positive = 64.0
    max_caption_characters: PositiveInt = 10_000
    max_rejects_fraction: Fraction = 0.05


Data = Annotated[UrlList | PictureFolder | ReadyShards, Field(discriminator="source")]
