"""A parquet or CSV file as rows of plain values, read in pieces, from a disk or an object store."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipelines.errors import UserError
from pipelines.stage import Json
from pipelines.stages.ingestion.source_files import version_of
from pipelines.store.fingerprint import file_sha256
from pipelines.store.location import Location

Value = str | bytes | int | float | bool | None  # of a cell; bytes are text that is not UTF-8
Piece = Any  # a pyarrow.RecordBatch

_PIECE_ROWS = 1 << 16


@dataclass(frozen=True)
class ListFile:
    """The list of a recipe's `data` section."""

    place: Location

    def identity(self) -> dict[str, Json]:
        """What stands for the content; `absent` for a list not yet at hand.

        A local list is read for it; of an object its size and version are enough.
        """
        if not self.place.is_file():
            return {"list_sha256": "absent"}
        if isinstance(self.place, Path):
            return {"list_sha256": file_sha256(self.place)}
        return {"list_version": version_of(self.place)}

    def column_names(self) -> list[str]:
        """Names of the list's columns.

        Raises:
            UserError: there is no such file, it is of another kind, or damaged.
        """
        import pyarrow.parquet as pq

        if not self.place.is_file():
            raise UserError(
                f"data.list: no file at {self.place}; put the list there or correct the path"
            )
        if self.place.suffix not in {".parquet", ".csv"}:
            raise UserError(f"data.list: must end in .parquet or .csv, got {self.place}")
        with self._errors():
            if self.place.suffix == ".csv":
                return self._csv_names()
            with self._open() as stream:
                return list(pq.read_schema(stream).names)

    def pieces(
        self, names: Sequence[str] | None, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, Piece]]:
        """Rows [start, stop) of some columns (None: all): (index of the first row, record batch).

        Raises:
            UserError: the file is damaged.
        """
        read = self._parquet_pieces if self.place.suffix == ".parquet" else self._csv_pieces
        with self._errors(), self._open() as stream:
            for first, piece in read(stream, names, start, stop):
                begin = max(start - first, 0)
                num_rows = piece.num_rows - begin
                if stop is not None:
                    num_rows = min(num_rows, stop - first - begin)
                if num_rows > 0:
                    yield first + begin, piece.slice(begin, num_rows)

    def _parquet_pieces(
        self, stream: IO[bytes], names: Sequence[str] | None, start: int, stop: int | None
    ) -> Iterator[tuple[int, Piece]]:
        """Pieces of the row groups that overlap [start, stop)."""
        import pyarrow.parquet as pq

        file = pq.ParquetFile(stream)
        first = 0
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            if end > start and (stop is None or first < stop):
                for piece in file.iter_batches(_PIECE_ROWS, row_groups=[group], columns=names):
                    yield first, piece
                    first += piece.num_rows
            first = end

    def _csv_pieces(
        self, stream: IO[bytes], names: Sequence[str] | None, start: int, stop: int | None
    ) -> Iterator[tuple[int, Piece]]:
        """Every column as the text that stands there: `007` is a key and a caption may be `1`."""
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        options = arrow_csv.ConvertOptions(
            column_types={name: pa.binary() for name in self._csv_names()},
            include_columns=list(names) if names is not None else None,
        )
        parsing = arrow_csv.ParseOptions(newlines_in_values=True)
        first = 0
        for piece in arrow_csv.open_csv(stream, parse_options=parsing, convert_options=options):
            yield first, piece
            first += piece.num_rows
            if stop is not None and first >= stop:
                return

    def _csv_names(self) -> list[str]:
        with self.place.open(encoding="utf-8-sig", newline="") as stream:
            return next(csv.reader(stream), [])

    def _open(self) -> IO[bytes]:
        return self.place.open("rb")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Tell what is the user's to mend; an object store that fails is tried again."""
        import pyarrow as pa

        local = (OSError,) if isinstance(self.place, Path) else ()
        users = (pa.ArrowException, FileNotFoundError, PermissionError, UnicodeDecodeError, *local)
        try:
            yield
        except users as error:
            raise UserError(f"data.list: cannot read {self.place}: {error!r}") from error


def column_values(column: Any) -> list[Value] | None:
    """A column as Python values; text that is not UTF-8 stays bytes. None: not of scalars."""
    import pyarrow as pa

    column = plain_column(column)
    if column is None:
        return None
    if pa.types.is_large_binary(column.type):
        return [_text(value) for value in column.to_pylist()]
    return column.to_pylist()


def plain_column(column: Any) -> Any:
    """A column as large_binary, numbers, booleans or nulls; None if it is of anything else."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        column = column.cast(kind)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        return column.cast(pa.large_binary())
    tests = ("large_binary", "integer", "floating", "boolean", "null")
    return column if any(getattr(pa.types, f"is_{test}")(kind) for test in tests) else None


def _text(value: bytes | None) -> Value:
    try:
        return value if value is None else value.decode()
    except UnicodeDecodeError:
        return value
