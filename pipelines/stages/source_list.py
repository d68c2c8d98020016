"""The list of a recipe's `data` section: its rows, their keys, and which are held out of training.

A row is held out by the value of a column, or by a hash of (seed, key): either way by itself, so
a unit reads only its own slice of the list, and other rows may come and go.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pipelines.errors import UserError
from pipelines.fingerprint import file_sha256
from pipelines.stage import Json, Unit
from pipelines.stages.rejects import Rejection

if TYPE_CHECKING:
    from pipelines.recipe import HeldOut

SPLITS = ("train", "held_out")
MAX_KEY_BYTES = 80  # a tar's member name has 100, and the longest extension takes 12

Value = str | bytes | int | float | bool | None  # of a cell; bytes are text that is not UTF-8
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

    @property
    def rejection(self) -> Rejection | None:
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
        return None


def is_safe_key(key: str) -> bool:
    """Whether a key can name the members of a tar and be found again in it."""
    if key.startswith("__") or "/" in key:  # webdataset's own entries; folders
        return False
    return 0 < len(key.encode()) <= MAX_KEY_BYTES


@dataclass(frozen=True, kw_only=True)
class SourceList:
    """A parquet or CSV file that names pictures and their captions, one a row."""

    path: Path
    address_column: str
    caption_column: str
    key_column: str  # "": rows are numbered from 0
    held_out: HeldOut
    seed: int  # of the held-out fraction

    def identity(self) -> dict[str, Json]:
        """The list's content and how it is read; `absent` stands for a list not yet at hand."""
        rule: dict[str, Json]
        if self.held_out.by_column:
            rule = {"column": self.held_out.column, "value": self.held_out.value}
        else:
            rule = {"fraction": self.held_out.fraction, "seed": self.seed}
        return {
            "list_sha256": file_sha256(self.path) if self.path.is_file() else "absent",
            "columns": {
                "address": self.address_column,
                "caption": self.caption_column,
                "key": self.key_column,
            },
            "held_out": rule,
        }

    def units(self, shard_images: int) -> list[Unit]:
        """One unit per shard: consecutive rows of one split.

        A unit names the slice of the list it lies in, and the rows of that slice whose key an
        earlier row of the list has.

        Raises:
            UserError: the list cannot be read, lacks a column, or holds nothing of the value
                that marks held-out rows.
        """
        self._check_columns()
        rows_of: dict[str, list[int]] = {split: [] for split in SPLITS}
        duplicates, seen = set(), set()
        for index, key, is_held_out in self._keys():
            rows_of[SPLITS[is_held_out]].append(index)
            if self.key_column and key in seen:
                duplicates.add(index)
            seen.add(key)
        if self.held_out.by_column and not rows_of["held_out"]:
            raise UserError(
                f"data.held_out.value: no row of {self.path} has {self.held_out.value!r} in "
                f"column {self.held_out.column!r}; name a value that stands there"
            )
        return [
            _unit(split, shard_index, rows[start : start + shard_images], duplicates)
            for split, rows in rows_of.items()
            for shard_index, start in enumerate(range(0, len(rows), shard_images))
        ]

    def rows(self, unit: Unit) -> Iterator[Row]:
        """The rows of a unit, in the order of the list."""
        arguments = unit.arguments
        start, duplicates = arguments["start"], set(arguments["duplicates"])
        columns = _read(self.path, None, start, arguments["stop"])
        ours = {self.address_column, self.caption_column}
        for offset, values in enumerate(zip(*columns.values())):
            cells = dict(zip(columns, values))
            key = self._key(start + offset, cells)
            if self._is_held_out(key, cells) != (arguments["split"] == "held_out"):
                continue
            yield Row(
                index=start + offset,
                key=key,
                address=cells.get(self.address_column, _NESTED),
                caption=cells.get(self.caption_column, _NESTED),
                columns={
                    name: value
                    for name, value in cells.items()
                    if name not in ours and _is_json_scalar(value)
                },
                is_duplicate=start + offset in duplicates,
            )

    def _keys(self) -> Iterator[tuple[int, str, bool]]:
        """(row index, key, is held out) of every row."""
        names = {self.key_column, self.held_out.column} - {""}
        columns = _read(self.path, sorted(names or {self.address_column}), 0, None)
        for index, values in enumerate(zip(*columns.values())):
            cells = dict(zip(columns, values))
            key = self._key(index, cells)
            yield index, key, self._is_held_out(key, cells)

    def _key(self, index: int, cells: dict[str, Value]) -> str:
        if not self.key_column:
            return f"{index:09d}"
        value = cells.get(self.key_column)
        text = value if isinstance(value, bytes) else str("" if value is None else value).encode()
        # In a tar, '/' makes folders and '.' begins the extension.
        return quote(text, safe=" !#$&'()+,;=@[]^`{}~").replace(".", "%2E")

    def _is_held_out(self, key: str, cells: dict[str, Value]) -> bool:
        if self.held_out.by_column:
            return str(cells.get(self.held_out.column)) == self.held_out.value
        digest = hashlib.blake2b(f"{self.seed}/{key}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) < self.held_out.fraction * 2**64

    def _check_columns(self) -> None:
        found = _column_names(self.path)
        for field, name in (
            ("address_column or data.path_column", self.address_column),
            ("caption_column", self.caption_column),
            ("key_column", self.key_column),
            ("held_out.column", self.held_out.column),
        ):
            if name and name not in found:
                raise UserError(
                    f"data.{field}: {self.path} has no column {name!r}; it has: {', '.join(found)}"
                )


def _unit(split: str, shard_index: int, rows: Sequence[int], duplicates: set[int]) -> Unit:
    return Unit(
        id=f"{split.replace('_', '-')}-{shard_index:05d}",
        arguments={
            "split": split,
            "start": rows[0],
            "stop": rows[-1] + 1,
            "duplicates": sorted(duplicates.intersection(rows)),
        },
    )


def _is_json_scalar(value: Value) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int)


# -- files ----------------------------------------------------------------------------------------


def _column_names(path: Path) -> list[str]:
    """Names of the list's columns.

    Raises:
        UserError: there is no such file, it is of another kind, or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(
            f"data.list: no file at {path.absolute()}; put the list there or correct the path"
        )
    if path.suffix not in {".parquet", ".csv"}:
        raise UserError(f"data.list: must end in .parquet or .csv, got {path.absolute()}")
    try:
        return list(pq.read_schema(path).names if path.suffix == ".parquet" else _csv_names(path))
    except (pa.ArrowException, OSError, UnicodeDecodeError, StopIteration) as error:
        raise UserError(f"data.list: cannot read {path.absolute()}: {error!r}") from error


def _csv_names(path: Path) -> list[str]:
    import csv

    with path.open(encoding="utf-8-sig", newline="") as stream:
        return next(csv.reader(stream))


def _read(
    path: Path, names: Sequence[str] | None, start: int, stop: int | None
) -> dict[str, list[Value]]:
    """Rows [start, stop) of some columns (None: all), as Python values; nested ones are left out.

    Raises:
        UserError: the file is damaged.
    """
    import pyarrow as pa

    try:
        if path.suffix == ".parquet":
            table = _read_parquet(path, names, start, stop)
        else:
            table = _read_csv(path, names)
            table = table.slice(start, None if stop is None else stop - start)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"data.list: cannot read {path.absolute()}: {error}") from error
    columns = ((name, _values(column)) for name, column in zip(table.column_names, table.columns))
    return {name: values for name, values in columns if values is not None}


def _read_parquet(path: Path, names: Sequence[str] | None, start: int, stop: int | None) -> Any:
    """Read the row groups that overlap [start, stop), and cut them to it."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        wanted: list[int] = []
        first_row = end = 0
        for group in range(file.num_row_groups):
            begin, end = end, end + file.metadata.row_group(group).num_rows
            if end > start and (stop is None or begin < stop):
                first_row = first_row if wanted else begin
                wanted.append(group)
        table = file.read_row_groups(wanted, columns=names)
    return table.slice(start - first_row, None if stop is None else stop - start)


def _read_csv(path: Path, names: Sequence[str] | None) -> Any:
    """Read every column as the text that stands there: `007` is a key and a caption may be `1`."""
    import pyarrow as pa
    from pyarrow import csv

    return csv.read_csv(
        path,
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(
            column_types={name: pa.binary() for name in _csv_names(path)},
            include_columns=list(names) if names is not None else None,
        ),
    )


def _values(column: Any) -> list[Value] | None:
    """A column as Python values; text that is not UTF-8 stays bytes. None: not of scalars."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        column = column.cast(kind)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column, kind = column.cast(pa.large_binary()), pa.large_binary()
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return [_text(value) for value in column.to_pylist()]
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return column.to_pylist()
    return [None] * len(column) if pa.types.is_null(kind) else None


def _text(value: bytes | None) -> Value:
    try:
        return value if value is None else value.decode()
    except UnicodeDecodeError:
        return value
