"""Where the members of a shard lie: a strict scan of tar headers over a memory map.

Readers of tar files usually take a file cut between two members for a shorter archive; here every
header is checked and the closing zero blocks are demanded, so a torn shard is an error. Nothing is
ever extracted; links, devices and paths that lead elsewhere are refused.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

_BLOCK_BYTES = 512
_CLOSING_BYTES = 2 * _BLOCK_BYTES  # a finished tar ends with at least two blocks of zeros
_MAX_EXTENDED_HEADER_BYTES = 1 << 20  # long names are short; a longer header is damage or an attack
_PAX_RECORD = re.compile(rb"([0-9]{1,7}) ([^=]+)=")
_PAX_SIZE = re.compile(r"[0-9]{1,19}")
_NOT_ZERO = re.compile(rb"[^\0]")
_WEBDATASET_META = re.compile(r"__[^/]*__($|/)")

_FILES = (b"0", b"\0", b"7")  # regular, regular before POSIX, contiguous
_DIRECTORY = b"5"
_GNU_LONG_NAME = b"L"
_PAX_MEMBER, _PAX_GLOBAL = b"x", b"g"
_REFUSED_TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"K": "a link with a long name",
    b"S": "a sparse file",
}


class ShardError(ValueError):
    """A shard is torn, unsafe or does not hold what its reader was promised."""


class Span(NamedTuple):
    """Where the bytes of one member lie in the tar."""

    offset: int
    num_bytes: int


Members = dict[str, Span]  # lower-case extension -> where


def split_member_name(name: str) -> tuple[str, str] | None:
    """Split a member path into key and extension, by webdataset's rule.

    The key is everything up to the first dot of the last path component, directories included;
    the extension is the rest in lower case: `a/b.Seg.PNG` -> (`a/b`, `seg.png`). None for members
    that belong to no sample: without extension, hidden files, `__meta__` entries.
    """
    directory, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or _WEBDATASET_META.match(name):
        return None
    return directory + slash + stem, extension.lower()


class MappedTar:
    """A tar of samples, memory-mapped read-only.

    Raises:
        ShardError: the file is empty.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ShardError(f"{path}: the shard is empty (0 bytes); fetch or produce it again")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, span: Span) -> bytes:
        """Copy out the bytes of one member."""
        return self._map[span.offset : span.offset + span.num_bytes]

    def index(self) -> dict[str, Members]:
        """Scan all headers once: key -> members, both in the order of the tar.

        Raises:
            ShardError: the tar is torn or damaged, has an unsafe or linked member, or a key or
                member occurs twice.
        """
        samples: dict[str, Members] = {}
        previous_key = None
        for name, span in _HeaderScan(self._map, self.path):
            split = split_member_name(name)
            if split is None:
                continue
            key, extension = split
            if key != previous_key and key in samples:
                raise ShardError(
                    f"{self.path}: duplicate key {key!r}: its members must lie side by side and "
                    f"occur once, but {name!r} follows members of {previous_key!r}"
                )
            members = samples.setdefault(key, {})
            if extension in members:
                raise ShardError(f"{self.path}: duplicate member {name!r}")
            members[extension] = span
            previous_key = key
        return samples

    def close(self) -> None:
        """Release the mapping and its file handle."""
        self._map.close()


class _HeaderScan:
    """Walk the headers of a tar (USTAR, GNU and pax long names), strictly.

    Written out instead of using `tarfile`, which ends silently at a cut on a member boundary and
    at a damaged header.
    """

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = 0
        self.name = ""  # of the member last seen, for messages

    def __iter__(self) -> Iterator[tuple[str, Span]]:
        """Yield (path, span) of every regular file."""
        overrides: dict[str, str] = {}  # pax or GNU fields for the next member
        while (header := self._header()) is not None:
            kind = header[156:157]
            num_bytes = self._number(header[124:136])
            if kind in (_PAX_MEMBER, _PAX_GLOBAL, _GNU_LONG_NAME):
                self._extend(overrides, kind, self._advance("extended header", num_bytes))
                continue
            # An overridden name field may be cut inside a character: leave it unread.
            name = overrides["path"] if "path" in overrides else self._name(header)
            num_bytes = int(overrides.get("size", num_bytes))
            overrides = {}
            self._check_safe(name, kind)
            span = self._advance(name, num_bytes)
            if kind != _DIRECTORY and not name.endswith("/"):
                yield name, span

    def _header(self) -> bytes | None:
        """Return the next header block, or None at a proper end."""
        header = self.data[self.position : self.position + _BLOCK_BYTES]
        where = f"after member {self.name!r}" if self.name else "at its start"
        if not header:
            self._fail(
                f"cut on a member boundary {where}: the two closing zero blocks are missing, "
                "so members may be lost"
            )
        if len(header) < _BLOCK_BYTES:
            self._fail(f"cut inside a header {where}")
        if not any(header):
            self._check_end(where)
            return None
        checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        if self._number(header[148:156]) != checksum:
            self._fail(f"no valid (uncompressed) tar header {where}: the checksum does not match")
        return header

    def _check_end(self, where: str) -> None:
        closing_bytes = len(self.data) - self.position
        if closing_bytes < _CLOSING_BYTES:
            self._fail(f"cut {where}: only one of the two closing zero blocks is there")
        if _NOT_ZERO.search(self.data, self.position):
            self._fail(f"the archive ends {where}, but more data follows the end")

    def _advance(self, name: str, num_bytes: int) -> Span:
        """Step over the data of a member."""
        span = Span(self.position + _BLOCK_BYTES, num_bytes)
        if span.offset + num_bytes > len(self.data):
            self._fail(
                f"cut inside member {name!r}: {num_bytes} bytes announced, "
                f"{len(self.data) - span.offset} present"
            )
        num_blocks = -(-num_bytes // _BLOCK_BYTES)
        self.position = span.offset + num_blocks * _BLOCK_BYTES
        self.name = name
        return span

    def _extend(self, overrides: dict[str, str], kind: bytes, span: Span) -> None:
        """Read an extended header into the fields of the member it precedes."""
        if span.num_bytes > _MAX_EXTENDED_HEADER_BYTES:
            self._fail(f"extended header of {span.num_bytes} bytes is too long to be genuine")
        data = self.data[span.offset : span.offset + span.num_bytes]
        if kind == _GNU_LONG_NAME:
            overrides["path"] = self._text(data.partition(b"\0")[0])
            return
        fields = self._pax_fields(data)
        if any(field.startswith("GNU.sparse") for field in fields):
            self._fail("a sparse file; a shard holds plain files only")
        if kind == _PAX_MEMBER:
            overrides.update(fields)
        elif fields.keys() & {"path", "size"}:
            self._fail("a global pax header sets the path or size of every member")

    def _pax_fields(self, data: bytes) -> dict[str, str]:
        """Parse pax records, each `LENGTH NAME=VALUE\\n` with LENGTH counting the whole record."""
        fields = {}
        position = 0
        while position < len(data):
            record = _PAX_RECORD.match(data, position)
            if not record or not record.end() < position + int(record[1]) <= len(data):
                self._fail("damaged pax header")
            name, end = record[2], position + int(record[1])
            if name in (b"path", b"size") or name.startswith(b"GNU.sparse"):
                fields[self._text(name)] = self._text(data[record.end() : end - 1])
            position = end
        if not _PAX_SIZE.fullmatch(fields.get("size", "0")):
            self._fail(f"damaged pax size {fields['size']!r}")
        return fields

    def _name(self, header: bytes) -> str:
        name = header[:100].partition(b"\0")[0]
        prefix = header[345:500].partition(b"\0")[0]
        if prefix and header[257:263] == b"ustar\0":  # GNU tars keep other things there
            name = prefix + b"/" + name
        return self._text(name)

    def _number(self, field: bytes) -> int:
        """Parse an octal number, or the GNU base-256 form of sizes from 8 GiB."""
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        digits = field.strip(b" \0")
        if digits.translate(None, b"01234567"):
            self._fail(f"no valid (uncompressed) tar header: {field!r} is no number")
        return int(digits or b"0", 8)

    def _text(self, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError:
            self._fail(f"member name {data!r} is not UTF-8")

    def _check_safe(self, name: str, kind: bytes) -> None:
        if kind in _REFUSED_TYPES:
            self._fail(f"member {name!r} is {_REFUSED_TYPES[kind]}; a shard holds plain files only")
        if kind not in _FILES and kind != _DIRECTORY:
            self._fail(f"member {name!r} has unknown type {kind!r}; a shard holds plain files only")
        if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
            self._fail(f"unsafe member path {name!r}: must be relative, without '..'")

    def _fail(self, problem: str) -> NoReturn:
        raise ShardError(f"{self.path}: {problem}; fetch or produce the shard again")
