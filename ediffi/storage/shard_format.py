"""Shards on disk: webdataset tars that are either whole or refused, and tensors as safetensors.

A shard is a tar whose members `KEY.EXTENSION` with the same key, lying side by side, form one
sample (the webdataset convention). Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from ediffi.storage.tar_index import MappedTar, ShardError, split_member_name

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")  # in order of preference
_DTYPES = {  # of safetensors headers
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_MAX_NAME_BYTES = 100  # of the name field of a USTAR header


def read_shard(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (key, {extension: bytes}) in the order of the tar.

    The whole tar is checked before the first sample is yielded.

    Raises:
        ShardError: see `MappedTar.index`.
    """
    with closing(MappedTar(path)) as tar:
        for key, members in tar.index().items():
            yield key, {extension: tar.read(span) for extension, span in members.items()}


def picture_of(members: Mapping[str, bytes]) -> bytes:
    """The encoded picture among a sample's members.

    Raises:
        ShardError: there is none.
    """
    for extension in IMAGE_EXTENSIONS:
        if extension in members:
            return members[extension]
    found = ", ".join(members)
    raise ShardError(f"a sample needs one of {', '.join(IMAGE_EXTENSIONS)}, found {found}")


def caption_of(members: Mapping[str, bytes]) -> str:
    """The caption among a sample's members.

    Raises:
        ShardError: there is none, or it is not UTF-8.
    """
    try:
        return members["txt"].decode()
    except (KeyError, UnicodeDecodeError) as error:
        raise ShardError(f"a sample needs a UTF-8 caption as member txt: {error}") from error


class ShardWriter:
    """Write a webdataset tar whose bytes depend on the samples alone.

    USTAR, modification time 0, no owner, members in the order of their extensions. The file
    appears under its name only when the `with` block ends without an exception; until then it
    lies beside it as `NAME.partial`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial_path = path.with_name(path.name + ".partial")
        self._keys: set[str] = set()

    def __enter__(self) -> ShardWriter:
        from webdataset import TarWriter

        self._file = open(self._partial_path, "wb")
        self._tar = TarWriter(
            self._file, user="", group="", mode=0o444, mtime=0, encoder=False, compress=False
        )
        self._tar.tarstream.encoding = "utf-8"  # whatever the locale of this machine
        return self

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample.

        Args:
            key: without '/', '.' or NUL, new to this shard.
            members: lower-case extension -> content, at least one.

        Raises:
            ShardError: the sample could not be read back as it was given.
        """
        if key in self._keys:
            raise ShardError(f"{self.path}: duplicate key {key!r}; give every sample its own")
        if not members:
            raise ShardError(f"{self.path}: sample {key!r} has no members and would vanish")
        for extension in members:
            self._check_name(key, extension)
        self._tar.write({"__key__": key, **members})
        self._keys.add(key)

    def _check_name(self, key: str, extension: str) -> None:
        name = f"{key}.{extension}"
        if set("/\0") & set(name) or split_member_name(name) != (key, extension):
            raise ShardError(
                f"{self.path}: member {name!r}: a key must have no '/', '.' or NUL, an extension "
                "must be lower-case without '/' or NUL"
            )
        if not extension or extension.startswith("_"):  # webdataset would leave it out silently
            raise ShardError(f"{self.path}: member {name!r}: extension empty or begins with '_'")
        if len(name.encode()) > _MAX_NAME_BYTES:
            raise ShardError(
                f"{self.path}: member name {name!r} must be at most {_MAX_NAME_BYTES} bytes (USTAR)"
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._tar.close()
            self._file.close()
            if kind is None:
                self._partial_path.replace(self.path)
        finally:
            self._file.close()
            self._partial_path.unlink(missing_ok=True)


def encode_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Pack named tensors as safetensors; dtypes are kept. Equal tensors, equal bytes."""
    return save_safetensors(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    )


def decode_tensors(data: bytes | bytearray) -> dict[str, Tensor]:
    """Unpack `encode_tensors`. Tensors share the memory of a bytearray; bytes are copied first.

    Raises:
        ShardError: the bytes are not safetensors, or cut.
    """
    buffer = data if isinstance(data, bytearray) else bytearray(data)
    start = 8 + int.from_bytes(buffer[:8], "little")
    if not 8 < start <= len(buffer):
        raise ShardError(f"not a safetensors member: no header in {len(buffer)} bytes")
    layout = _layout(bytes(buffer[8:start]))
    if start + layout.num_bytes != len(buffer):
        raise ShardError(
            f"not a safetensors member: {len(buffer)} bytes, its header says "
            f"{start + layout.num_bytes}"
        )
    return {
        name: torch.frombuffer(buffer, dtype=dtype, count=count, offset=start + begin).view(shape)
        if count
        else torch.empty(shape, dtype=dtype)
        for name, dtype, shape, count, begin in layout.tensors
    }


class _Layout(NamedTuple):
    """A safetensors header, parsed."""

    tensors: tuple[tuple[str, torch.dtype, tuple[int, ...], int, int], ...]
    num_bytes: int  # of all tensors together


@lru_cache(maxsize=4096)  # a stream has one header per number of tokens
def _layout(header: bytes) -> _Layout:
    """Parse a header; tensors must lie one after another, without holes, as the format demands."""
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors, end = [], 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            if not all(type(size) is int and size >= 0 for size in shape):
                raise ValueError(f"tensor {name!r} has the shape {shape}")
            count = math.prod(shape)
            if entry["data_offsets"] != [end, end + count * dtype.itemsize]:
                raise ValueError(f"tensor {name!r} does not lie where its shape says")
            tensors.append((name, dtype, shape, count, end))
            end += count * dtype.itemsize
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ShardError(f"not a safetensors member: {type(error).__name__}: {error}") from error
    return _Layout(tuple(tensors), end)
