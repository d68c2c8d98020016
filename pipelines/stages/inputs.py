"""What stages read of each other's manifests: joined shards, encoders and snapshots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.driver.stand_ins import is_stand_in
from pipelines.recipe import Encoder
from pipelines.stage import File, Json, Manifest, Receipt

if TYPE_CHECKING:
    from ediffi.conditioning import StreamConfig
    from ediffi.encoding.encoder_weights import EncoderConfig
    from ediffi.shards import ShardRef

EMBED_PREFIX = "embed/"
CLIP_FOLDER = "clip"  # where `clip_fit` puts the CLIP it made
NULL_UNIT = "null"  # the unit of `embed` that makes the embedding of the empty caption


def image_shards(ingest: Manifest, split: str | None = None) -> Iterator[Receipt]:
    """Receipts of the image shards of one split (None: of all), leaving out empty shards."""
    for receipt in ingest.receipts:
        if receipt.num_out and split in (None, receipt.facts["split"]):
            yield receipt


def shard_file(receipt: Receipt) -> File:
    """The one tar among a unit's files."""
    return next(file for file in receipt.files if file.path.endswith(".tar"))


def embeds_of(inputs: Mapping[str, Manifest]) -> dict[str, Manifest]:
    """Embedding caches among a stage's inputs, by encoder name."""
    return {
        name.removeprefix(EMBED_PREFIX): manifest
        for name, manifest in inputs.items()
        if name.startswith(EMBED_PREFIX)
    }


def joined_shards(inputs: Mapping[str, Manifest], split: str) -> tuple[ShardRef, ...]:
    """Image shards of a split, each with the same-named shard of every embedding cache."""
    from ediffi.caches import open_caches

    embeds = {name: str(embed.directory) for name, embed in embeds_of(inputs).items()}
    return tuple(open_caches(str(inputs["ingest"].directory), embeds, split=split))


def encoder_config(encoder: Encoder, inputs: Mapping[str, Manifest]) -> EncoderConfig:
    """The model library's own description of an encoder, `fitted` weights resolved to a path."""
    from ediffi.encoding.encoder_weights import EncoderConfig

    values = {field.name: getattr(encoder, field.name) for field in fields(EncoderConfig)}
    if encoder.is_fitted:
        values["weights"] = str(inputs["clip_fit"].local_folder(CLIP_FOLDER))
    return EncoderConfig(**values)


def stream_configs(
    encoders: Mapping[str, Encoder], inputs: Mapping[str, Manifest]
) -> tuple[StreamConfig, ...]:
    """The network's streams: names and dropout from the recipe, widths as found in the caches."""
    from ediffi.conditioning import StreamConfig

    streams = []
    for name, embed in embeds_of(inputs).items():
        facts = embed.receipt(NULL_UNIT).facts
        streams.append(
            StreamConfig(
                name=name,
                token_width=facts["token_width"],
                pooled_width=facts["pooled_width"],
                pooled_as_token=encoders[name].is_image,
                dropout=encoders[name].dropout,
            )
        )
    return tuple(streams)


def snapshot_paths(manifest: Manifest) -> dict[str, Path]:
    """Snapshot directories of a training stage by unit; none for those that were not trained."""
    return {
        receipt.unit: manifest.local_folder(receipt.unit)
        for receipt in manifest.receipts
        if not is_stand_in(receipt)
    }


def without(values: Mapping[str, Json], names: Iterable[str]) -> dict[str, Json]:
    """A copy of a mapping less some names."""
    left_out = set(names)
    return {name: value for name, value in values.items() if name not in left_out}
