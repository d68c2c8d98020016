"""Joining the tars of one shard by sample key: which sample lies where, in every tar.

Positions never matter: embeddings are found by key, and what has no partner is an error, is left
out or stays without, as the missing policy says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ediffi.storage.shard_files import ShardRef
from ediffi.storage.shard_format import IMAGE_EXTENSIONS
from ediffi.storage.tar_index import ShardError, TarIndex

Missing = Literal["error", "skip", "null"]


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinedIndex:
    """Where every member of a joined shard lies: 16 bytes a member, and the keys."""

    keys: list[str]
    spans: NDArray[np.int64]  # (samples, 2 + streams, 2): image, caption, then the streams


def join(
    shard: ShardRef, streams: Sequence[str], indexes: Sequence[TarIndex], missing: Missing
) -> JoinedIndex:
    """Check the tars of a shard against each other, and apply the missing policy.

    Args:
        shard: whose tars they are.
        streams: names of the embeddings, in the order of `indexes`.
        indexes: of the pictures' tar, then of each stream's.
        missing: see `ediffi.shards.JoinedShards`.

    Raises:
        ShardError: a member or, under `error`, a partner is missing.
    """
    pictures, *embeddings = indexes
    image, caption = _picture_spans(shard, pictures)
    columns = [image, caption]
    for name, index in zip(streams, embeddings):
        location = shard.embeddings[name].location
        spans = index.column("safetensors")
        if not spans[:, 0].all():
            key = index.keys[int(np.argmin(spans[:, 0]))]
            raise ShardError(f"{location}: sample {key!r} has no member {key}.safetensors")
        if index.keys != pictures.keys:
            if missing == "error":
                _check_same_keys(shard, name, pictures.keys, index.keys)
            row_of = {key: row for row, key in enumerate(index.keys)}
            rows = [row_of.get(key, -1) for key in pictures.keys]
            spans = np.concatenate([spans, np.zeros((1, 2), dtype=np.int64)])[rows]  # -1: absent
        columns.append(spans)
    table, keys = np.stack(columns, axis=1), pictures.keys
    if missing == "skip":
        whole = np.asarray((table[:, :, 0] > 0).all(axis=1))
        table, keys = table[whole], [key for key, kept in zip(keys, whole) if kept]
    return JoinedIndex(keys=keys, spans=table)


def _picture_spans(shard: ShardRef, index: TarIndex) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find image and caption of every sample; other members are left alone."""
    location = shard.images.location
    image = np.zeros((len(index.keys), 2), dtype=np.int64)
    for extension in IMAGE_EXTENSIONS:
        image = np.where(image[:, :1] > 0, image, index.column(extension))
    caption = index.column("txt")
    if not image[:, 0].all():
        row = int(np.argmin(image[:, 0]))
        found = ", ".join(name for name, spans in index.spans.items() if spans[row, 0])
        raise ShardError(
            f"{location}: sample {index.keys[row]!r} has no image: needs one member of "
            f"{', '.join(IMAGE_EXTENSIONS)}, found {found}"
        )
    if not caption[:, 0].all():
        key = index.keys[int(np.argmin(caption[:, 0]))]
        raise ShardError(f"{location}: image {key!r} has no caption: needs a member {key}.txt")
    if len(index.keys) != shard.num_samples:
        raise ShardError(
            f"{location}: {len(index.keys)} samples found, {shard.num_samples} recorded: the "
            "shard is not the one that was recorded; produce it again"
        )
    return image, caption


def _check_same_keys(
    shard: ShardRef, stream: str, pictures: Sequence[str], embeddings: Sequence[str]
) -> None:
    location = shard.embeddings[stream].location
    remedy = "embed the shard again, or choose the missing policy 'skip' or 'null'"
    if lacking := sorted(set(pictures) - set(embeddings)):
        raise ShardError(
            f"{location}: no {stream!r} embedding of {lacking[0]!r} ({len(lacking)} of "
            f"{len(pictures)} samples lack theirs); {remedy}"
        )
    if orphans := sorted(set(embeddings) - set(pictures)):
        raise ShardError(
            f"{location}: {stream!r} embedding of {orphans[0]!r} has no image in "
            f"{shard.images.location} ({len(orphans)} such); {remedy}"
        )
