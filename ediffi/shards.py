"""Training samples from joined shards.

Pictures and captions lie in one tar, every encoder's embeddings in another tar of the same name;
the tars are joined by sample key. This module is the front door: it also names what lies in
`shard_format`, `pictures` and `sample_order`.
Axes: C = 3 (RGB), H W in pixels, T tokens, D embedding width.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ediffi.pictures import ImageError, Resize, check_fit, decode_image, fit_image
from ediffi.sample_order import SampleOrder
from ediffi.shard_format import (
    IMAGE_EXTENSIONS,
    ShardWriter,
    caption_of,
    decode_tensors,
    encode_tensors,
    picture_of,
    read_shard,
)
from ediffi.tar_index import MappedTar, Members, ShardError, Span

__all__ = [
    "ShardError",
    "ShardWriter",
    "read_shard",
    "picture_of",
    "caption_of",
    "encode_tensors",
    "decode_tensors",
    "ImageError",
    "decode_image",
    "fit_image",
    "Resize",
    "ShardRef",
    "Sample",
    "Missing",
    "JoinedShards",
    "SampleOrder",
]

Missing = Literal["error", "skip", "null"]

_MAX_MAPPED_TARS = 256  # each holds a file handle; the usual limit of a process is 1024
_FILE_STATE = ("_indexes", "_map")  # attributes of JoinedShards that stay in their process
_ABSENT = Span(0, 0)  # no member begins at byte 0: its header does


@dataclass(frozen=True, kw_only=True)
class ShardRef:
    """One shard: the tar of pictures and captions, and a tar of embeddings per stream."""

    name: str
    image_path: Path
    embedding_paths: Mapping[str, Path]  # stream name -> tar
    num_samples: int  # pictures that the receipt of `image_path` promises

    def __post_init__(self) -> None:
        if self.num_samples < 0:
            raise ValueError(
                f"num_samples of shard {self.name!r} must be at least 0, got {self.num_samples}"
            )


@dataclass
class Sample:
    """One training sample."""

    key: str
    caption: str
    image: Tensor  # uint8 (3, H, W)
    streams: dict[str, dict[str, Tensor]]  # stream -> {"tokens": (T, D), "pooled": (D,)}


@dataclass(frozen=True, kw_only=True)
class _ShardIndex:
    """Where every member of a joined shard lies: 16 bytes per member, one header scan per tar."""

    keys: list[str]
    spans: NDArray[np.int64]  # (samples, 2 + streams, 2): image, caption, then the streams


class JoinedShards(Dataset[Sample]):
    """Map-style data set over shards of pictures, captions and embeddings.

    A tar is mapped when first touched, and its headers are scanned once; after that a sample
    costs a few slices and the decoding, wherever it lies. Copies sent to worker processes carry
    neither file handles nor indexes: each maps what it touches. Handles are bounded, and `close`
    releases them; the next access maps again.

    Args:
        shards: all with the same streams.
        image_px: side of the pictures returned.
        resize: how pictures of other sizes are fitted, see `fit_image`.
        missing: what to do with a picture that lacks an embedding. `error` raises ShardError on
            opening its shard (also for an embedding without picture); `skip` leaves the sample
            out, for which all shards are scanned at once, here; `null` leaves the stream out of
            the sample, which `collate` turns into the null embedding.

    Raises:
        ValueError: no shards, differing streams, or an unknown setting.
        ShardError: a shard is torn, or it does not hold what its ShardRef promises.
    """

    def __init__(
        self,
        shards: Sequence[ShardRef],
        *,
        image_px: int,
        resize: Resize = "center_crop",
        missing: Missing = "error",
    ) -> None:
        check_fit(image_px, resize)
        if missing not in get_args(Missing):
            choices = ", ".join(get_args(Missing))
            raise ValueError(f"missing must be one of {choices}, got {missing!r}")
        self.streams = _common_streams(shards)
        self.shards = tuple(shards)
        self.image_px = image_px
        self.resize: Resize = resize
        self.missing: Missing = missing
        self._forget_files()
        if missing == "skip":
            self.shard_sizes = tuple(len(self._index(i).keys) for i in range(len(shards)))
        else:
            self.shard_sizes = tuple(shard.num_samples for shard in shards)
        self._shard_ends = list(accumulate(self.shard_sizes))

    def __len__(self) -> int:
        return self._shard_ends[-1]

    def __getitem__(self, sample_index: int) -> Sample:
        """Read one sample; samples are numbered shard by shard, in the order of the tars.

        Raises:
            IndexError: `sample_index` outside [0, len).
            ShardError: see the class; also a picture or embedding that cannot be decoded.
        """
        if not 0 <= sample_index < len(self):
            raise IndexError(f"sample_index must be in [0, {len(self)}), got {sample_index}")
        shard_index = bisect_right(self._shard_ends, sample_index)
        row = sample_index - self._shard_ends[shard_index] + self.shard_sizes[shard_index]
        shard, index = self.shards[shard_index], self._index(shard_index)
        image_span, caption_span, *stream_spans = (
            Span(*span) for span in index.spans[row].tolist()
        )
        key = index.keys[row]
        return Sample(
            key=key,
            caption=self._caption(shard, key, caption_span),
            image=self._image(shard, key, image_span),
            streams={
                name: self._tensors(shard.embedding_paths[name], key, span)
                for name, span in zip(self.streams, stream_spans)
                if span != _ABSENT
            },
        )

    def close(self) -> None:
        """Release all file handles."""
        self._map.cache_clear()

    def _forget_files(self) -> None:
        self._indexes: dict[int, _ShardIndex] = {}
        # An evicted tar is unmapped when its last reader lets go: safe between threads.
        self._map = lru_cache(maxsize=_MAX_MAPPED_TARS)(MappedTar)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name not in _FILE_STATE}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._forget_files()

    def _index(self, shard_index: int) -> _ShardIndex:
        if shard_index not in self._indexes:
            self._indexes[shard_index] = _join(self.shards[shard_index], self.streams, self.missing)
        return self._indexes[shard_index]

    def _caption(self, shard: ShardRef, key: str, span: Span) -> str:
        try:
            return self._map(shard.image_path).read(span).decode()
        except UnicodeDecodeError as error:
            raise ShardError(f"{shard.image_path}: caption of {key!r} is not UTF-8") from error

    def _image(self, shard: ShardRef, key: str, span: Span) -> Tensor:
        try:
            picture = decode_image(self._map(shard.image_path).read(span))
        except ImageError as error:
            raise ShardError(f"{shard.image_path}: image of {key!r}: {error}") from error
        image_HWC = fit_image(picture, self.image_px, self.resize)
        return torch.from_numpy(np.ascontiguousarray(image_HWC.transpose(2, 0, 1)))

    def _tensors(self, path: Path, key: str, span: Span) -> dict[str, Tensor]:
        try:
            return decode_tensors(self._map(path).read(span))
        except ShardError as error:
            raise ShardError(f"{path}: embedding of {key!r}: {error}") from error


def _common_streams(shards: Sequence[ShardRef]) -> tuple[str, ...]:
    if not shards:
        raise ValueError("JoinedShards needs at least one shard, got none")
    streams = tuple(shards[0].embedding_paths)
    for shard in shards:
        if set(shard.embedding_paths) != set(streams):
            raise ValueError(
                f"all shards must have the same streams: {shards[0].name!r} has "
                f"{sorted(streams)}, {shard.name!r} has {sorted(shard.embedding_paths)}"
            )
    return streams


def _join(shard: ShardRef, streams: Sequence[str], missing: Missing) -> _ShardIndex:
    """Index a shard: scan its tars, check them against each other, apply the missing policy."""
    pictures = _scan_pictures(shard)
    embeddings = [_scan_embeddings(shard.embedding_paths[name]) for name in streams]
    if missing == "error":
        for name, spans in zip(streams, embeddings):
            _check_same_keys(shard, name, pictures.keys(), spans.keys())
    keys = [
        key for key in pictures if missing != "skip" or all(key in spans for spans in embeddings)
    ]
    rows = [[*pictures[key], *(spans.get(key, _ABSENT) for spans in embeddings)] for key in keys]
    table = np.array(rows, dtype=np.int64).reshape(len(keys), 2 + len(streams), 2)
    return _ShardIndex(keys=keys, spans=table)


def _scan(path: Path) -> dict[str, Members]:
    with closing(MappedTar(path)) as tar:
        return tar.index()


def _scan_pictures(shard: ShardRef) -> dict[str, tuple[Span, Span]]:
    """Find image and caption of every sample; other members are left alone."""
    spans = {}
    for key, members in _scan(shard.image_path).items():
        image = next((members[e] for e in IMAGE_EXTENSIONS if e in members), None)
        caption = members.get("txt")
        if image is None:
            found = ", ".join(members)
            raise ShardError(
                f"{shard.image_path}: sample {key!r} has no image: needs one member of "
                f"{', '.join(IMAGE_EXTENSIONS)}, found {found}"
            )
        if caption is None:
            raise ShardError(
                f"{shard.image_path}: image {key!r} has no caption: needs a member {key}.txt"
            )
        spans[key] = (image, caption)
    if len(spans) != shard.num_samples:
        raise ShardError(
            f"{shard.image_path}: {len(spans)} samples found, {shard.num_samples} recorded: the "
            "shard is not the one that was recorded; produce it again"
        )
    return spans


def _scan_embeddings(path: Path) -> dict[str, Span]:
    spans = {}
    for key, members in _scan(path).items():
        if "safetensors" not in members:
            raise ShardError(f"{path}: sample {key!r} has no member {key}.safetensors")
        spans[key] = members["safetensors"]
    return spans


def _check_same_keys(
    shard: ShardRef, stream: str, pictures: Set[str], embeddings: Set[str]
) -> None:
    path = shard.embedding_paths[stream]
    remedy = "embed the shard again, or choose the missing policy 'skip' or 'null'"
    if lacking := sorted(pictures - embeddings):
        raise ShardError(
            f"{path}: no {stream!r} embedding of {lacking[0]!r} ({len(lacking)} of "
            f"{len(pictures)} samples lack theirs); {remedy}"
        )
    if orphans := sorted(embeddings - pictures):
        raise ShardError(
            f"{path}: {stream!r} embedding of {orphans[0]!r} has no image in {shard.image_path} "
            f"({len(orphans)} such); {remedy}"
        )
