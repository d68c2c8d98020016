"""Training samples from joined shards.

Pictures and captions lie in one tar, every encoder's embeddings in another tar of the same name;
the tars are joined by sample key. This module is the front door: it also names what lies in
`shard_files`, `shard_format`, `pictures` and `sample_order`.
Axes: C = 3 (RGB), H W in pixels, T tokens, D embedding width.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ediffi.encoding.quantization import dequantize
from ediffi.pictures import ImageError, Resize, check_fit, decode_image, fit_image
from ediffi.sample_order import SampleOrder
from ediffi.storage import remote
from ediffi.storage.local_cache import LocalCache
from ediffi.storage.shard_check import Verify, check_files
from ediffi.storage.shard_files import ShardFile, ShardRef
from ediffi.storage.shard_format import (
    ShardWriter,
    caption_of,
    decode_tensors,
    encode_tensors,
    picture_of,
    read_shard,
)
from ediffi.storage.shard_join import JoinedIndex, Missing, join
from ediffi.storage.shard_tars import Request, Tar, open_tar, read_indexes, read_requests
from ediffi.storage.tar_index import ShardError

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
    "ShardFile",
    "ShardRef",
    "Sample",
    "Missing",
    "Verify",
    "JoinedShards",
    "SampleOrder",
]

_FILE_STATE = ("_open_shard", "_process_id")  # attributes of JoinedShards that stay here


@dataclass(slots=True)
class Sample:
    """One training sample."""

    key: str
    caption: str
    image: Tensor  # uint8 (3, H, W)
    streams: dict[str, dict[str, Tensor]]  # stream -> {"tokens": (T, D), "pooled": (D,)}


@dataclass(frozen=True, slots=True)
class _OpenShard:
    """A shard in use: its tars, pictures first, and where the members lie in them."""

    ref: ShardRef
    tars: tuple[Tar, ...]
    index: JoinedIndex

    def requests(self, row: int) -> list[Request]:
        """What to read for one sample: image, caption, then the streams (offset 0: missing)."""
        (image, caption, *streams), (pictures, *embeddings) = (
            self.index.spans[row].tolist(),
            self.tars,
        )
        return [
            (pictures, *image),
            (pictures, *caption),
            *[(tar, *span) for tar, span in zip(embeddings, streams)],
        ]


class JoinedShards(Dataset[Sample]):
    """Map-style data set over shards of pictures, captions and embeddings, local or remote.

    A shard is opened when first touched: local tars are mapped, remote ones begin to arrive in a
    local cache while their members are read by ranges. Its members are found through the sidecars,
    or by one scan of the headers. At most `max_open_shards` are open at a time, so memory does not
    grow with the number of shards. Copies sent to worker processes carry neither handles nor
    indexes; forked workers keep local mappings and open remote shards anew.

    Int8 token states come back as bf16, see `ediffi.encoding.quantization`.

    Args:
        shards: all with the same streams.
        image_px: side of the pictures returned.
        resize: how pictures of other sizes are fitted, see `fit_image`.
        missing: what to do with a picture that lacks an embedding. `error` raises ShardError on
            opening its shard (also for an embedding without picture); `skip` leaves the sample
            out, for which the indexes of all shards are read at once, here; `null` leaves the
            stream out of the sample, which `collate` turns into the null embedding.
        verify: how thoroughly files are held against their records, here, see `check_files`.
        verify_seed: which few files `verify="sample"` hashes.
        cache: where remote tars are kept; `default` is the environment's, `LocalCache.default`.
        max_open_shards: at least twice the windows of the order, or shards are opened again and
            again. Each holds a file handle per tar.

    Raises:
        ValueError: no shards, differing streams, or an unknown setting.
        ShardError: a file is not the one recorded, a shard is torn, or it does not hold what its
            ShardRef promises.
        OSError: a file cannot be read.
    """

    def __init__(
        self,
        shards: Sequence[ShardRef],
        *,
        image_px: int,
        resize: Resize = "center_crop",
        missing: Missing = "error",
        verify: Verify = "sample",
        verify_seed: int = 0,
        cache: LocalCache | Literal["default"] = "default",
        max_open_shards: int = 32,
    ) -> None:
        check_fit(image_px, resize)
        if missing not in get_args(Missing):
            choices = ", ".join(get_args(Missing))
            raise ValueError(f"missing must be one of {choices}, got {missing!r}")
        if max_open_shards < 1:
            raise ValueError(f"max_open_shards must be at least 1, got {max_open_shards}")
        self.streams = _common_streams(shards)
        self.shards = tuple(shards)
        self.image_px = image_px
        self.resize: Resize = resize
        self.missing: Missing = missing
        self.max_open_shards = max_open_shards
        self.cache = LocalCache.default() if cache == "default" else cache
        files = list(chain.from_iterable(shard.files() for shard in self.shards))
        self._is_remote = any(remote.is_remote(file.location) for file in files)
        self._forget_files()
        check_files(files, verify=verify, seed=verify_seed)
        self.shard_sizes = tuple(
            len(self._open(i).index.keys) if missing == "skip" else shard.num_samples
            for i, shard in enumerate(self.shards)
        )
        self._shard_ends = list(accumulate(self.shard_sizes))

    def __len__(self) -> int:
        return self._shard_ends[-1]

    def __getitem__(self, sample_index: int) -> Sample:
        """Read one sample; samples are numbered shard by shard, in the order of the tars.

        Raises:
            IndexError: `sample_index` outside [0, len).
            ShardError: see the class; also a picture or embedding that cannot be decoded.
            OSError: a file cannot be read.
        """
        return self.__getitems__([sample_index])[0]

    def __getitems__(self, sample_indices: Sequence[int]) -> list[Sample]:
        """Read several samples, as `DataLoader` asks for a batch; remote ones all at once.

        Raises:
            IndexError, ShardError, OSError: see `__getitem__`.
        """
        if self._is_remote and self._process_id != os.getpid():
            self._forget_files()  # the threads that fetch did not come along through the fork
        rows = [self._find(sample_index) for sample_index in sample_indices]
        requests = [shard.requests(row) for shard, row in rows]
        wanted_now = [request for wanted in requests for request in wanted if request[1]]
        data = iter(read_requests(wanted_now))
        return [
            self._sample(shard, row, [next(data) if offset else None for _, offset, _ in wanted])
            for (shard, row), wanted in zip(rows, requests)
        ]

    def close(self) -> None:
        """Release all file handles."""
        self._open_shard.cache_clear()

    def _forget_files(self) -> None:
        # An evicted tar is unmapped when its last reader lets go: safe between threads.
        self._open_shard = lru_cache(maxsize=self.max_open_shards)(self._open)
        self._process_id = os.getpid()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name not in _FILE_STATE}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._forget_files()

    def _find(self, sample_index: int) -> tuple[_OpenShard, int]:
        if not 0 <= sample_index < len(self):
            raise IndexError(f"sample_index must be in [0, {len(self)}), got {sample_index}")
        shard_index = bisect_right(self._shard_ends, sample_index)
        row = sample_index - self._shard_ends[shard_index] + self.shard_sizes[shard_index]
        return self._open_shard(shard_index), row

    def _open(self, shard_index: int) -> _OpenShard:
        ref = self.shards[shard_index]
        files = [ref.images, *(ref.embeddings[name] for name in self.streams)]
        tars = tuple(open_tar(file, self.cache) for file in files)
        index = join(ref, self.streams, read_indexes(files, tars), self.missing)
        return _OpenShard(ref, tars, index)

    def _sample(self, shard: _OpenShard, row: int, data: list[bytearray | None]) -> Sample:
        key, location = shard.index.keys[row], shard.ref.images.location
        image, caption, *streams = data
        assert image is not None, "`join` saw to it"
        assert caption is not None
        try:
            return Sample(
                key=key,
                caption=caption.decode(),
                image=self._image(image),
                streams={
                    name: _tensors(shard.ref, name, key, found)
                    for name, found in zip(self.streams, streams)
                    if found is not None
                },
            )
        except UnicodeDecodeError as error:
            raise ShardError(f"{location}: caption of {key!r} is not UTF-8") from error
        except ImageError as error:
            raise ShardError(f"{location}: image of {key!r}: {error}") from error

    def _image(self, data: bytearray) -> Tensor:
        image_HWC = fit_image(decode_image(bytes(data)), self.image_px, self.resize)
        return torch.from_numpy(np.ascontiguousarray(image_HWC.transpose(2, 0, 1)))


def _tensors(shard: ShardRef, stream: str, key: str, data: bytearray) -> dict[str, Tensor]:
    try:
        return dequantize(decode_tensors(data))
    except ValueError as error:
        location = shard.embeddings[stream].location
        raise ShardError(f"{location}: embedding of {key!r}: {error}") from error


def _common_streams(shards: Sequence[ShardRef]) -> tuple[str, ...]:
    if not shards:
        raise ValueError("JoinedShards needs at least one shard, got none")
    streams = tuple(shards[0].embeddings)
    names = set(streams)
    for shard in shards:
        if shard.embeddings.keys() != names:
            raise ValueError(
                f"all shards must have the same streams: {shards[0].name!r} has "
                f"{sorted(streams)}, {shard.name!r} has {sorted(shard.embeddings)}"
            )
    return streams
