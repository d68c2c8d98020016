"""The list of a recipe's `data` section: its rows, their keys, and which are held out of training.

A row is held out by the value of a column, or by a hash of (seed, key): either way by itself, so
a unit reads only its own slice of the list, and other rows may come and go.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING
from urllib.parse import quote

from pipelines.errors import UserError
from pipelines.stage import Json, Unit
from pipelines.stages.ingestion.list_file import ListFile, Piece, Value, column_values
from pipelines.stages.ingestion.rejects import Rejection
from pipelines.stages.ingestion.row_shards import OpenShard
from pipelines.store.location import Location

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipelines.recipe import HeldOut

SPLITS = ("train", "held_out")
MAX_KEY_BYTES = 80  # a tar's member name has 100, and the longest extension takes 12

_NESTED = b""  # the cell of a column of lists or structures: not text either


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the list: a picture's address, its caption, and the rest."""

    index: int  # in the list
    key: str
    address: Value
    caption: Value
    columns: dict[str, Json]  # the other scalar columns
    is_duplicate: bool  # an earlier row has the same key

    def rejection(self, max_caption_characters: int) -> Rejection | None:
        """What is wrong with the row itself, before anyone looks at its picture."""
        if not is_safe_key(self.key):
            return Rejection(reason="key_invalid", message=f"row {self.index}: key {self.key!r}")
        if self.is_duplicate:
            return Rejection(reason="duplicate_key")
        for name, value in (("caption", self.caption), ("address", self.address)):
            if value is None or (isinstance(value, str) and not value.strip()):
                return Rejection(reason=f"{name}_empty")
            if not isinstance(value, str) or "\0" in value:
                return Rejection(reason=f"{name}_invalid", message=repr(value)[:100])
        return caption_length(len(str(self.caption)), max_caption_characters)


def caption_length(num_characters: int, max_caption_characters: int) -> Rejection | None:
    """Whether a caption is longer than `data.max_caption_characters`."""
    if num_characters <= max_caption_characters:
        return None
    problem = (
        f"{num_characters} characters, data.max_caption_characters allows {max_caption_characters}"
    )
    return Rejection(reason="caption_too_long", message=problem)


def is_safe_key(key: str) -> bool:
    """Whether a key can name the members of a tar and be found again in it."""
    if key.startswith("__") or "/" in key:  # webdataset's own entries; folders
        return False
    return 0 < len(key.encode()) <= MAX_KEY_BYTES


@dataclass(frozen=True, kw_only=True)
class SourceList:
    """A parquet or CSV file that names pictures and their captions, one a row."""

    place: Location
    address_column: str
    caption_column: str
    key_column: str  # "": rows are numbered from 0
    held_out: HeldOut
    seed: int  # of the held-out fraction

    @property
    def file(self) -> ListFile:
        return ListFile(self.place)

    def identity(self) -> dict[str, Json]:
        """The list's content and how it is read; `absent` stands for a list not yet at hand."""
        return {**self.file.identity(), **self._reading()}

    def units(self, shard_images: int, settings: Mapping[str, Json]) -> Iterator[Unit]:
        """One unit per shard: consecutive rows of one split.

        A unit names the slice of the list it lies in, and the rows of that slice whose key an
        earlier row of the list has. Its key stands for its own rows alone: if one caption changes,
        one shard does. But shards are cut by position, so a row that is put in or taken out moves
        all rows behind it, and their shards change; append rows rather than insert them.

        The list is walked through twice, in pieces: for its keys at once, so that an unfit list
        is told before any work, and for its content as units are asked for. In memory stay about
        30 bytes a row (1 if rows are numbered).

        Args:
            settings: what else decides the bytes of a shard.

        Raises:
            UserError: the list cannot be read, lacks a column, or holds nothing of the value
                that marks held-out rows.
        """
        self._check_columns()
        is_held_out, hashes = self._walk()
        if self.held_out.by_column and not is_held_out.any():
            raise UserError(
                f"data.held_out.value: no row of {self.place} has {self.held_out.value!r} in "
                f"column {self.held_out.column!r}; name a value that stands there"
            )
        duplicates = self._duplicates(hashes) if self.key_column else set()
        whole = {"columns": self._reading()["columns"], **settings}
        shards = {split: OpenShard(split, duplicates, whole) for split in SPLITS}
        return self._units(is_held_out, shards, shard_images)

    def rows(self, unit: Unit) -> Iterator[Row]:
        """The rows of a unit, in the order of the list."""
        arguments = unit.arguments
        duplicates = set(arguments["duplicates"])
        is_held_out, wants_held_out = self._rule(), arguments["split"] == "held_out"
        ours = {self.address_column, self.caption_column}
        pieces = self.file.pieces(None, arguments["start"], arguments["stop"])
        for index, cells in chain.from_iterable(_rows_of(*piece) for piece in pieces):
            key = self._key(index, cells.get(self.key_column))
            if is_held_out(key, cells.get(self.held_out.column)) != wants_held_out:
                continue
            yield Row(
                index=index,
                key=key,
                address=cells.get(self.address_column, _NESTED),
                caption=cells.get(self.caption_column, _NESTED),
                columns={
                    name: value
                    for name, value in cells.items()
                    if name not in ours and _is_json_scalar(value)
                },
                is_duplicate=index in duplicates,
            )

    # -- planning ---------------------------------------------------------------------------------

    def _units(
        self, is_held_out: NDArray[np.bool_], shards: Mapping[str, OpenShard], shard_images: int
    ) -> Iterator[Unit]:
        import numpy as np

        for first, piece in self.file.pieces(None):
            here = is_held_out[first : first + piece.num_rows]
            full = []
            for split, shard in shards.items():
                rows = np.flatnonzero(here == (split == "held_out"))
                while len(rows):
                    taken = rows[: shard_images - shard.num_rows]
                    shard.add(first, piece, taken)
                    rows = rows[len(taken) :]
                    if shard.num_rows == shard_images:
                        full.append(shard.close())
            # By the row that filled them: an order that the cut into pieces does not change.
            yield from sorted(full, key=lambda unit: unit.arguments["stop"])
        yield from (shard.close() for shard in shards.values() if shard.num_rows)

    def _walk(self) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Of every row whether it is held out, and a hash of its key."""
        import numpy as np

        held_out, hashes = bytearray(), [np.empty(0, np.int64)]
        for _, keys, flags in self._keys():
            held_out += bytes(flags)
            if self.key_column:
                hashes.append(np.fromiter(map(hash, keys), np.int64, len(keys)))
        return np.frombuffer(held_out, np.bool_), np.concatenate(hashes)

    def _duplicates(self, hashes: NDArray[np.int64]) -> set[int]:
        """Rows whose key an earlier row has: found by hash, made sure of by the keys themselves."""
        import numpy as np

        ordered = np.sort(hashes)
        twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        if not len(twice):
            return set()
        suspects = np.isin(hashes, twice)
        seen: set[str] = set()
        duplicates = set()
        for first, keys, _ in self._keys():
            for offset in np.flatnonzero(suspects[first : first + len(keys)]).tolist():
                if keys[offset] in seen:
                    duplicates.add(first + offset)
                seen.add(keys[offset])
        return duplicates

    def _keys(self) -> Iterator[tuple[int, list[str], list[bool]]]:
        """(index of the first row, keys, whether held out) of all rows, piece by piece."""
        names = sorted({self.key_column, self.held_out.column} - {""} or {self.address_column})
        is_held_out = self._rule()
        for first, piece in self.file.pieces(names):
            indices = range(first, first + piece.num_rows)
            cells = _scalars(piece)
            nothing = [None] * piece.num_rows
            keys = list(map(self._key, indices, cells.get(self.key_column, nothing)))
            marks = cells.get(self.held_out.column, nothing)
            yield first, keys, list(map(is_held_out, keys, marks))

    # -- what a row is ----------------------------------------------------------------------------

    def _reading(self) -> dict[str, Json]:
        """How the list is read."""
        rule: dict[str, Json]
        if self.held_out.by_column:
            rule = {"column": self.held_out.column, "value": self.held_out.value}
        else:
            rule = {"fraction": self.held_out.fraction, "seed": self.seed}
        return {
            "columns": {
                "address": self.address_column,
                "caption": self.caption_column,
                "key": self.key_column,
            },
            "held_out": rule,
        }

    def _key(self, index: int, value: Value) -> str:
        """The key of a row: from its key column's cell, if there is one."""
        if not self.key_column:
            return f"{index:09d}"
        text = value if isinstance(value, bytes) else str("" if value is None else value).encode()
        # In a tar, '/' makes folders and '.' begins the extension.
        return quote(text, safe=" !#$&'()+,;=@[]^`{}~").replace(".", "%2E")

    def _rule(self) -> Callable[[str, Value], bool]:
        """What tells from a key and a cell of the held-out column whether a row is held out."""
        if self.held_out.by_column:
            wanted = self.held_out.value
            return lambda _, mark: str(mark) == wanted
        bound, prefix = int(self.held_out.fraction * 2**64), f"{self.seed}/"
        if not bound:
            return lambda *_: False

        def by_hash(key: str, _: Value) -> bool:
            digest = hashlib.blake2b((prefix + key).encode(), digest_size=8).digest()
            return int.from_bytes(digest) < bound

        return by_hash

    def _check_columns(self) -> None:
        found = self.file.column_names()
        for field, name in (
            ("address_column or data.path_column", self.address_column),
            ("caption_column", self.caption_column),
            ("key_column", self.key_column),
            ("held_out.column", self.held_out.column),
        ):
            if name and name not in found:
                raise UserError(
                    f"data.{field}: {self.place} has no column {name!r}; it has: {', '.join(found)}"
                )


def _scalars(piece: Piece) -> dict[str, list[Value]]:
    """The cells of a piece by column; nested columns are left out."""
    columns = zip(piece.schema.names, piece.columns)
    values = {name: column_values(column) for name, column in columns}
    return {name: cells for name, cells in values.items() if cells is not None}


def _rows_of(first: int, piece: Piece) -> Iterator[tuple[int, dict[str, Value]]]:
    """(index, cells by column) of a piece's rows."""
    scalars = _scalars(piece)
    for offset in range(piece.num_rows):
        yield first + offset, {name: cells[offset] for name, cells in scalars.items()}


def _is_json_scalar(value: Value) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int)
