"""A batch comes out of its parcel as it went in, whatever its type."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ediffi.storage.parcel import PackedCollate, Parcel


@dataclass
class Batch:
    """A batch of a user's own type."""

    images: Tensor
    parts: dict[str, list[Tensor | None]]
    keys: tuple[str, ...]


def make_batch() -> Batch:
    return Batch(
        images=torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4).transpose(1, 2),
        parts={
            "tokens": [torch.randn(3, 5).bfloat16(), None, torch.zeros(0, 7)],
            "flags": [torch.tensor([True, False, True]), torch.tensor(2.5, dtype=torch.double)],
        },
        keys=("a", "b"),
    )


def tensors_of(batch: Batch) -> list[Tensor]:
    return [batch.images, *(t for part in batch.parts.values() for t in part if t is not None)]


def test_batch_survives_with_types_and_shapes() -> None:
    """Strided views, bf16, empty and scalar tensors, None and text all come back."""
    batch = make_batch()
    found = Parcel.pack(batch).unpack()
    assert (type(found), found.keys, found.parts.keys()) == (Batch, batch.keys, batch.parts.keys())
    assert found.parts["tokens"][1] is None
    for a, b in zip(tensors_of(found), tensors_of(batch), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a, b)


def test_tensors_share_one_piece_of_shared_memory() -> None:
    """One buffer holds them all, aligned, and nothing is copied on the way out."""
    parcel = Parcel.pack(make_batch())
    assert parcel.buffer.is_shared()
    found = tensors_of(parcel.unpack())
    storages = {tensor.untyped_storage().data_ptr() for tensor in found if tensor.numel()}
    assert storages == {parcel.buffer.untyped_storage().data_ptr()}
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found if tensor.numel())


def test_batch_without_tensors_is_packed_too() -> None:
    """An empty buffer is no obstacle."""
    assert Parcel.pack(["a", 1]).unpack() == ["a", 1]


def collate_numbers(numbers: list[int]) -> dict[str, Tensor]:
    return {"numbers": torch.tensor(numbers), "squares": torch.tensor(numbers) ** 2}


def test_parcels_pass_between_processes() -> None:
    """Packed in a worker, unpacked in its parent, and alive after the worker is gone."""
    loader = DataLoader(
        range(6), batch_size=3, num_workers=1, collate_fn=PackedCollate(collate_numbers)
    )
    batches = [parcel.unpack() for parcel in loader]
    assert [batch["squares"].tolist() for batch in batches] == [[0, 1, 4], [9, 16, 25]]


@pytest.mark.gpu
def test_pinned_parcel_gives_pinned_tensors() -> None:
    """All tensors are page-locked by one call."""
    found = Parcel.pack(make_batch()).pin_memory().unpack()
    assert all(tensor.is_pinned() for tensor in tensors_of(found) if tensor.numel())
