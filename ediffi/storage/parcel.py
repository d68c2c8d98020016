"""Handing a batch from a worker process to its parent in one piece.

Every tensor that goes through a `DataLoader`'s queue is a file of shared memory with a handshake
of its own. A parcel puts all tensors of a batch, of whatever type the batch is, into one piece of
shared memory; the parent's tensors are views of it, nothing is copied twice.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT_BYTES = 64  # a cache line; also a multiple of every element's size
_Part = tuple[torch.dtype, tuple[int, ...], int]  # dtype, shape, offset in the buffer


@dataclass
class Parcel:
    """A batch on its way: its tensors in one buffer, and everything else.

    The pickle never leaves the two processes, which fork from one program: no file holds it.
    """

    rest: bytes
    buffer: Tensor  # uint8, in shared memory

    @classmethod
    def pack(cls, batch: object) -> Parcel:
        """Put a batch into shared memory; whatever can be pickled can be packed."""
        file = io.BytesIO()
        packer = _Packer(file, protocol=pickle.HIGHEST_PROTOCOL)
        packer.dump(batch)
        storage = torch.UntypedStorage._new_shared(max(1, packer.num_bytes))
        buffer = torch.empty(0, dtype=torch.uint8).set_(storage)
        for part, tensor in zip(packer.parts, packer.tensors):
            _view(buffer, part).copy_(tensor)
        return cls(file.getvalue(), buffer)

    def unpack(self) -> Any:
        """The batch again. Its tensors share one piece of memory, freed with the last of them."""
        return _Unpacker(io.BytesIO(self.rest), self.buffer).load()

    def pin_memory(self) -> Parcel:
        """Page-lock all tensors at once; DataLoader calls it."""
        return Parcel(self.rest, self.buffer.pin_memory())


class PackedCollate:
    """Collate in the worker, and pack."""

    def __init__(self, collate: Callable[[Sequence[Any]], object]) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[Any]) -> Parcel:
        return Parcel.pack(self.collate(samples))


class _Packer(pickle.Pickler):
    """Pickle everything but plain CPU tensors, which are counted and left for the buffer."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol=protocol)
        self.parts: list[_Part] = []
        self.tensors: list[Tensor] = []
        self.num_bytes = 0

    def persistent_id(self, item: object) -> _Part | None:
        if type(item) is not Tensor or item.layout != torch.strided or item.device.type != "cpu":
            return None
        part = (item.dtype, tuple(item.shape), self.num_bytes)
        self.parts.append(part)
        self.tensors.append(item.detach())
        self.num_bytes += -(-item.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return part


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, buffer: Tensor) -> None:
        super().__init__(file)
        self.buffer = buffer

    def persistent_load(self, part: _Part) -> Tensor:
        return _view(self.buffer, part)


def _view(buffer: Tensor, part: _Part) -> Tensor:
    dtype, shape, offset = part
    return buffer[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(shape)
