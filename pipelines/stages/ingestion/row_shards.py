"""Cutting the rows of a list into shards, and naming what each shard is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Set
from typing import TYPE_CHECKING, Any

from pipelines.stage import Json, Unit
from pipelines.stages.ingestion.list_file import Piece, plain_column
from pipelines.store.fingerprint import unit_key

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class OpenShard:
    """The rows of one split that will be the next unit, and a digest of them.

    The digest is over streams of values, column by column: how the file is cut into row groups
    does not enter it.
    """

    def __init__(self, split: str, duplicates: Set[int], settings: Json) -> None:
        self.split = split
        self._all_duplicates = duplicates
        self._settings = settings
        self._shard_index = 0
        self._clear()

    def _clear(self) -> None:
        self.num_rows = 0
        self._start = self._stop = 0
        self._duplicates: list[int] = []
        self._streams: dict[str, Any] = {}

    def add(self, first: int, piece: Piece, offsets: NDArray[np.int64]) -> None:
        """Take in rows of a piece that begins with row `first` of the list."""
        import pyarrow as pa

        if not self.num_rows:
            self._start = first + int(offsets[0])
        self._stop = first + int(offsets[-1]) + 1
        self.num_rows += len(offsets)
        indices = first + offsets
        self._update("row", indices)
        self._duplicates += [row for row in indices.tolist() if row in self._all_duplicates]
        rows = piece.take(pa.array(offsets))
        for name, column in zip(rows.schema.names, rows.columns):
            plain = plain_column(column)
            if plain is not None:
                for part, data in _streams(plain):
                    self._update(f"{part} {name}", data)

    def close(self) -> Unit:
        """The unit of these rows; the next rows begin another."""
        rows = {name: stream.hexdigest() for name, stream in self._streams.items()}
        unit = Unit(
            id=f"{self.split.replace('_', '-')}-{self._shard_index:05d}",
            arguments={
                "split": self.split,
                "start": self._start,
                "stop": self._stop,
                "duplicates": self._duplicates,
            },
            key=unit_key(self._settings, rows=rows, duplicates=self._duplicates),
        )
        self._shard_index += 1
        self._clear()
        return unit

    def _update(self, stream: str, data: Any) -> None:
        if stream not in self._streams:
            self._streams[stream] = hashlib.sha256()
        self._streams[stream].update(data)


def _streams(column: Any) -> Iterator[tuple[str, Any]]:
    """The bytes that stand for a plain column: which cells are null, their sizes, their content."""
    import numpy as np
    import pyarrow as pa

    yield "null", column.is_null().to_numpy(zero_copy_only=False).tobytes()
    if pa.types.is_null(column.type):
        return
    if not pa.types.is_large_binary(column.type):
        zero = False if pa.types.is_boolean(column.type) else 0
        yield "values", column.fill_null(zero).to_numpy(zero_copy_only=False).tobytes()
        return
    column = column.fill_null(b"")
    _, ends, data = column.buffers()
    bounds = np.frombuffer(ends, np.int64)[column.offset : column.offset + len(column) + 1]
    yield "sizes", np.diff(bounds).tobytes()
    yield "content", memoryview(data)[bounds[0] : bounds[-1]] if data is not None else b""
