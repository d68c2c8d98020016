"""The two files of a unit's log: the raw one that a process writes into, and the log itself."""

from __future__ import annotations

import json
import os
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from pipelines.masking import masker
from pipelines.store.location import Location, location
from pipelines.store.processes import is_running, process_start, process_table

MAX_LOG_BYTES = 16 * 1024**2
MAX_TAIL_BYTES = 64 * 1024  # of the end of a log that is too long: there the reason stands
MAX_LINE_BYTES = 64 * 1024
READ_BYTES = 1024**2
FIRST_SEND_S, LAST_SEND_S = 10.0, 120.0  # between two copies to a bucket
_PREFIX = "ediffi-unit-"
_OFFSET_DIGITS = 16


class LogFile:
    """A log in the store: each line with its time, without secrets, the whole up to a limit.

    In a bucket it is one object, replaced now and then, and grows in `local` meanwhile.

    Args:
        local: goes on with this file of a bucket's log, instead of beginning one.
    """

    def __init__(
        self, place: Location, *, max_bytes: int = MAX_LOG_BYTES, local: Path | None = None
    ) -> None:
        self.place = place
        if isinstance(place, Path):
            place.parent.mkdir(parents=True, exist_ok=True)
            self.local = place
        else:
            self.local = local or Path(tempfile.gettempdir()) / f"{_PREFIX}{uuid.uuid4().hex}.log"
        self._stream = os.fdopen(
            os.open(self.local, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640), "ab"
        )
        self._mask: Callable[[str], str] = masker()
        self._room = max_bytes
        self._tail: deque[bytes] = deque()
        self._num_tail_bytes = self._num_left_out = 0
        self._send_s, self._next_send = FIRST_SEND_S, time.monotonic() + FIRST_SEND_S

    @property
    def is_full(self) -> bool:
        return self._room <= 0

    def write(self, line: str) -> str:
        """Add a line; returns it without secrets."""
        line = self._mask(line)
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]
        data = f"{stamp}Z {line}\n".encode()
        if not self.is_full:
            self._room -= len(data)
            self._stream.write(data)
            return line
        self._tail.append(data)
        self._num_tail_bytes += len(data)
        while self._num_tail_bytes > MAX_TAIL_BYTES and len(self._tail) > 1:
            self._num_tail_bytes -= len(self._tail.popleft())
            self._num_left_out += 1
        return line

    def flush(self) -> None:
        self._stream.flush()

    def send(self) -> None:
        """Copy what is there to its bucket, if the time has come."""
        if self.local != self.place and time.monotonic() >= self._next_send:
            self._send_s = min(2 * self._send_s, LAST_SEND_S)
            self._next_send = time.monotonic() + self._send_s
            self._copy()

    def close(self, last_line: str) -> None:
        """Write the end: the tail that the limit held back, and the last line."""
        if self._num_left_out:
            self._stream.write(
                f"... {self._num_left_out:,} lines left out here: the log is too long\n".encode()
            )
        self._stream.writelines(self._tail)
        self._tail.clear()
        self._room = max(self._room, 1)
        self.write(last_line)
        self._stream.close()
        if self.local != self.place:
            self._copy()
            self.local.unlink()

    def _copy(self) -> None:
        assert not isinstance(self.place, Path)
        self.place.fs.put_file(str(self.local), self.place.path)


class RawFile:
    """A temporary file that a process says everything into, and how far it has been read.

    Its first line says whose log it is, the second how much of it stands there already, so that
    another process can finish the log if this one is killed.
    """

    def __init__(self, path: Path, number: int, start: int) -> None:
        self._path, self.number, self._position = path, number, start
        self._rest = b""

    @classmethod
    def new(cls, log: LogFile) -> Self:
        owner = {
            "process_table": process_table(),
            "pid": os.getpid(),
            "process_started": process_start(),
            "place": str(log.place),
            "local": str(log.local),
        }
        number, name = tempfile.mkstemp(prefix=_PREFIX, suffix=".raw")  # none but us may read it
        head = json.dumps(owner).encode() + b"\n"
        start = len(head) + _OFFSET_DIGITS + 1
        os.write(number, head + b"%0*d\n" % (_OFFSET_DIGITS, start))
        os.close(number)
        # Several processes write: each adds at the end, wherever that is by then.
        number = os.open(name, os.O_RDWR | os.O_APPEND)
        return cls(Path(name), number, start)

    def lines(self, *, is_last: bool) -> Iterator[str]:
        """Complete lines that are new; with `is_last` also one that has not ended."""
        while data := os.pread(self.number, READ_BYTES, self._position):
            self._position += len(data)
            *whole, self._rest = (self._rest + data).split(b"\n")
            yield from map(_text, whole)
            if len(self._rest) > MAX_LINE_BYTES:
                yield _text(self._rest)
                self._rest = b""
        if is_last and self._rest:
            yield _text(self._rest)
            self._rest = b""

    def mark_read(self, *, shorten: bool) -> None:
        """Note how far it was read. With `shorten` let go what was, at the price of a few lines."""
        if shorten:
            head = os.pread(self.number, READ_BYTES, 0).split(b"\n", 1)[0]
            self._position, self._rest = len(head) + _OFFSET_DIGITS + 2, b""
            os.ftruncate(self.number, self._position)
        # Not through `number`: what is opened for adding adds, whatever place it is told.
        with self._path.open("r+b") as stream:
            stream.readline()
            stream.write(b"%0*d" % (_OFFSET_DIGITS, self._position - len(self._rest)))

    def remove(self) -> None:
        os.close(self.number)
        self._path.unlink(missing_ok=True)


def _text(line: bytes) -> str:
    """A line as people saw it: of a progress bar, its last state."""
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")


def recover(store: Location, tell: Callable[[str], None]) -> None:
    """Finish the logs, in this store, of workers on this machine that were killed.

    Args:
        tell: given a line where that fails; it is tried again by the next unit.
    """
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*.raw"):
        claimed = path.with_suffix(f".claimed-{os.getpid()}")
        try:
            if path.lstat().st_uid != os.getuid() or not (owner := _dead_owner(path)):
                continue
            if not owner["place"].startswith(f"{store}/"):
                continue  # another store, which need not be within reach
            path.rename(claimed)  # one of several that see it wins
        except FileNotFoundError:
            continue  # another was faster
        try:
            _recover(claimed, owner)
        except Exception as error:  # every store has errors of its own
            tell(f"the log {owner['place']} of a killed worker is incomplete: {error}")
            claimed.rename(path)


def _dead_owner(path: Path) -> dict[str, str]:
    """What the file's first line says; empty if its process lives, or may live."""
    try:
        owner = json.loads(path.read_bytes().split(b"\n", 1)[0])
    except ValueError:
        return {}  # not yet written
    is_ours = owner["process_table"] == process_table()
    # containers may share the directory, and see none of each other's processes
    return owner if is_ours and not is_running(owner["pid"], owner["process_started"]) else {}


def _recover(claimed: Path, owner: dict[str, str]) -> None:
    with claimed.open("rb") as stream:
        stream.readline()
        start = int(stream.readline())
    raw = RawFile(claimed, os.open(claimed, os.O_RDONLY), start)
    try:
        # of a bucket's log, what had not yet been copied lies in the local file
        log = LogFile(location(owner["place"]), local=Path(owner["local"]))
        for line in raw.lines(is_last=True):
            log.write(line)
        log.close("# the worker ended here without a word")
    except BaseException:
        os.close(raw.number)
        raise
    raw.remove()
