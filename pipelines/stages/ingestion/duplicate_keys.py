"""Keys that occur in more than one shard, found in bounded memory.

Every unit leaves `keys/UNIT.u64`, a 64 bit hash of each of its keys in the order of its samples.
The hashes of all units are dealt out by value into files on disk, each small enough to be sorted;
equal hashes are then held against the keys themselves, which the index beside each tar has. So
memory grows with the number of duplicates, not with that of samples.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.store.location import Location

if TYPE_CHECKING:
    from numpy.typing import NDArray

KEYS_FOLDER = "keys"
NUM_KEYS_SORTED = 1 << 23  # at a time: about 400 MB
MAX_PARTS = 512  # files open at a time

_RECORD = [("hash", "<u8"), ("unit", "<u4"), ("sample", "<u4")]
_NUM_INDEXES_KEPT = 64  # of shards whose keys are compared

Place = tuple[int, int]  # unit index, sample index


def write_keys(keys: Iterable[str], path: Path) -> None:
    """Write the hashes of a shard's keys, eight bytes each, little-endian."""
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as stream:
        for key in keys:
            digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
            stream.write(digest[::-1])  # blake2b tells big-endian, numpy reads little


def find_duplicates(
    directory: Location, unit_ids: Sequence[str], num_keys: int
) -> dict[int, list[str]]:
    """Keys that an earlier unit has already: unit index -> keys, in the order of its samples.

    Args:
        directory: of the stage, with the `keys` folder and the index of every shard.
        unit_ids: in the order in which they take precedence.
        num_keys: of all units together.
    """
    num_parts = min(MAX_PARTS, -(-num_keys // NUM_KEYS_SORTED)) or 1
    losers: dict[int, list[tuple[int, str]]] = {}
    keys_of = lru_cache(_NUM_INDEXES_KEPT)(lambda unit: _keys(directory, unit_ids[unit]))
    with tempfile.TemporaryDirectory(prefix="ediffi-keys-") as scratch:
        parts = [Path(scratch) / str(index) for index in range(num_parts)]
        _deal_out(directory, unit_ids, parts)
        for part in parts:
            for places in _equal_hashes(part):
                seen: dict[str, int] = {}
                for unit, sample in places:
                    key = keys_of(unit)[sample]
                    if key in seen and seen[key] != unit:
                        losers.setdefault(unit, []).append((sample, key))
                    seen.setdefault(key, unit)
    return {unit: [key for _, key in sorted(losers[unit])] for unit in sorted(losers)}


def _deal_out(directory: Location, unit_ids: Sequence[str], parts: Sequence[Path]) -> None:
    """Append every unit's hashes to the files that their values belong to."""
    import numpy as np

    with ExitStack() as stack:
        streams = [stack.enter_context(part.open("wb")) for part in parts]
        for unit_index, unit_id in enumerate(unit_ids):
            data = (directory / KEYS_FOLDER / f"{unit_id}.u64").read_bytes()
            records = np.empty(len(data) // 8, _RECORD)
            records["hash"] = np.frombuffer(data, "<u8")
            records["unit"] = unit_index
            records["sample"] = np.arange(len(records))
            high_bits = records["hash"] >> np.uint64(32)
            part_of = (high_bits * np.uint64(len(parts))) >> np.uint64(32)
            for part_index in np.unique(part_of).tolist():
                streams[part_index].write(records[part_of == part_index].tobytes())


def _equal_hashes(part: Path) -> Iterator[list[Place]]:
    """Groups of samples of one hash, each group in the order of precedence."""
    import numpy as np

    records: NDArray[Any] = np.fromfile(part, _RECORD)
    order = np.argsort(records["hash"], kind="stable")  # which keeps units in their order
    hashes = records["hash"][order]
    starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]]))
    sizes = np.diff(np.append(starts, len(hashes)))
    for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist()):
        group = records[order[start : start + size]]
        yield list(zip(group["unit"].tolist(), group["sample"].tolist()))


def _keys(directory: Location, unit_id: str) -> list[str]:
    from ediffi.storage.tar_index import read_index

    path = directory / f"{unit_id}.index.json"
    return read_index(path.read_bytes(), str(path), tar_bytes=0, sha256="").keys
