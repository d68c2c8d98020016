"""Walking the headers of a tar, strictly: USTAR, GNU and pax long names, nothing extracted.

Readers of tar files usually take a file cut between two members for a shorter archive; here every
header is checked and the closing zero blocks are demanded, so a torn shard is an error. Links,
devices and paths that lead elsewhere are refused. Written out instead of using `tarfile`, which
ends silently at a cut on a member boundary and at a damaged header.
"""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

_BLOCK_BYTES = 512
_CLOSING_BYTES = 2 * _BLOCK_BYTES  # a finished tar ends with at least two blocks of zeros
_MAGIC_OFFSET = 257  # of the word `ustar` in a header, in every dialect since 1988
_MAX_EXTENDED_HEADER_BYTES = 1 << 20  # long names are short; a longer header is damage or an attack
_PAX_RECORD = re.compile(rb"([0-9]{1,7}) ([^=]+)=")
_PAX_SIZE = re.compile(r"[0-9]{1,19}")
_NOT_ZERO = re.compile(rb"[^\0]")
_WEBDATASET_META = re.compile(r"__[^/]*__($|/)")

_FILES = (b"0", b"\0", b"7")  # regular, regular before POSIX, contiguous
_DIRECTORY = b"5"
_GNU_LONG_NAME, _GNU_LONG_LINK = b"L", b"K"
_PAX_MEMBER, _PAX_GLOBAL = b"x", b"g"
_EXTENDED = (_PAX_MEMBER, _PAX_GLOBAL, _GNU_LONG_NAME, _GNU_LONG_LINK)
_LINKS = {b"1": "a hard link", b"2": "a symbolic link"}
_SPECIAL = {
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"S": "a sparse file",
}
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"6")  # whatever their size field says

ProblemReason = Literal[
    "shard_empty",
    "shard_truncated",
    "shard_damaged",
    "path_unsafe",
    "member_link",
    "member_special",
    "duplicate_key",
    "duplicate_member",
]


class ShardError(ValueError):
    """A shard is torn, unsafe or does not hold what its reader was promised."""


class TarProblem(ShardError):
    """What is wrong with one place of a tar.

    Attributes:
        reason: the word that receipts count.
        name: path of the member concerned, "" where it is none in particular.
        problem: the sentence, without the file's name.
    """

    def __init__(self, path: Path, reason: ProblemReason, name: str, problem: str) -> None:
        super().__init__(path, reason, name, problem)  # all in args: it may cross processes
        self.path = path
        self.reason = reason
        self.name = name
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}; fetch or produce the shard again"


class Span(NamedTuple):
    """Where the bytes of one member lie in the tar."""

    offset: int
    num_bytes: int


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


class TarHeaders:
    """A walk over the headers of one tar; `position` is where the next one is expected.

    After a TarProblem with a member's name and a reason that is not about the shard, the walk
    stands behind that member and can go on; after any other, `resync` finds where to go on.
    """

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = 0
        self.name = ""  # of the member last seen, for messages

    def next_file(self) -> tuple[str, Span] | None:
        """Find (path, span) of the next regular file; None at a proper end.

        Raises:
            TarProblem: the tar is cut or damaged here, or the member is refused.
        """
        overrides: dict[str, str] = {}  # pax or GNU fields for the next member
        while (header := self._header()) is not None:
            kind = header[156:157]
            num_bytes = self._number(header[124:136])
            if kind in _EXTENDED:
                self._extend(overrides, kind, self._advance("extended header", num_bytes))
                continue
            # An overridden name field may be cut inside a character: leave it unread.
            name = overrides["path"] if "path" in overrides else self._name(header)
            num_bytes = 0 if kind in _WITHOUT_DATA else int(overrides.get("size", num_bytes))
            overrides = {}
            span = self._advance(name, num_bytes)
            self._check_safe(name, kind)
            if kind != _DIRECTORY and not name.endswith("/"):
                return name, span
        return None

    def resync(self) -> bool:
        """Step to the next sound header after damage; False if there is none.

        Headers begin on whole blocks and carry the word `ustar` and a checksum: a false hit needs
        a tar inside a tar.
        """
        block_index = self.position // _BLOCK_BYTES + 1
        while True:
            start = block_index * _BLOCK_BYTES + _MAGIC_OFFSET
            found = self.data.find(b"ustar", start)
            if found < 0:
                return False
            position = found - _MAGIC_OFFSET
            block = self.data[position : position + _BLOCK_BYTES]
            is_header = position % _BLOCK_BYTES == 0 and len(block) == _BLOCK_BYTES
            if is_header and self._checksum_fits(block):
                self.position = position
                return True
            block_index = position // _BLOCK_BYTES + 1

    def _header(self) -> bytes | None:
        """Return the next header block, or None at a proper end."""
        header = self.data[self.position : self.position + _BLOCK_BYTES]
        where = f"after member {self.name!r}" if self.name else "at its start"
        if not header:
            self._truncated(
                f"cut on a member boundary {where}: the two closing zero blocks are missing, "
                "so members may be lost"
            )
        if len(header) < _BLOCK_BYTES:
            self._truncated(f"cut inside a header {where}")
        if not any(header):
            self._check_end(where)
            return None
        if not self._checksum_fits(header):
            self._damaged(
                f"no valid (uncompressed) tar header {where}: the checksum does not match"
            )
        return header

    def _checksum_fits(self, header: bytes) -> bool:
        field = header[148:156].strip(b" \0")
        if not field.isdigit() or field.translate(None, b"01234567"):
            return False
        return int(field, 8) == sum(header) - sum(header[148:156]) + 8 * ord(" ")

    def _check_end(self, where: str) -> None:
        closing_bytes = len(self.data) - self.position
        if closing_bytes < _CLOSING_BYTES:
            self._truncated(f"cut {where}: only one of the two closing zero blocks is there")
        if _NOT_ZERO.search(self.data, self.position):
            self._damaged(f"the archive ends {where}, but more data follows the end")

    def _advance(self, name: str, num_bytes: int) -> Span:
        """Step over the data of a member."""
        span = Span(self.position + _BLOCK_BYTES, num_bytes)
        if span.offset + num_bytes > len(self.data):
            self._truncated(
                f"cut inside member {name!r}: {num_bytes} bytes announced, "
                f"{len(self.data) - span.offset} present",
                name,
            )
        num_blocks = -(-num_bytes // _BLOCK_BYTES)
        self.position = span.offset + num_blocks * _BLOCK_BYTES
        self.name = name
        return span

    def _extend(self, overrides: dict[str, str], kind: bytes, span: Span) -> None:
        """Read an extended header into the fields of the member it precedes."""
        if span.num_bytes > _MAX_EXTENDED_HEADER_BYTES:
            self._damaged(f"extended header of {span.num_bytes} bytes is too long to be genuine")
        if kind == _GNU_LONG_LINK:  # the link itself follows, and is refused
            return
        data = self.data[span.offset : span.offset + span.num_bytes]
        if kind == _GNU_LONG_NAME:
            overrides["path"] = self._text(data.partition(b"\0")[0])
            return
        fields = self._pax_fields(data)
        if any(field.startswith("GNU.sparse") for field in fields):
            self._damaged("a sparse file; a shard holds plain files only")
        if kind == _PAX_MEMBER:
            overrides.update(fields)
        elif fields.keys() & {"path", "size"}:
            self._damaged("a global pax header sets the path or size of every member")

    def _pax_fields(self, data: bytes) -> dict[str, str]:
        """Parse pax records, each `LENGTH NAME=VALUE\\n` with LENGTH counting the whole record."""
        fields = {}
        position = 0
        while position < len(data):
            record = _PAX_RECORD.match(data, position)
            if not record or not record.end() < position + int(record[1]) <= len(data):
                self._damaged("damaged pax header")
            name, end = record[2], position + int(record[1])
            if name in (b"path", b"size") or name.startswith(b"GNU.sparse"):
                fields[self._text(name)] = self._text(data[record.end() : end - 1])
            position = end
        if not _PAX_SIZE.fullmatch(fields.get("size", "0")):
            self._damaged(f"damaged pax size {fields['size']!r}")
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
            self._damaged(f"no valid (uncompressed) tar header: {field!r} is no number")
        return int(digits or b"0", 8)

    def _text(self, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError:
            self._damaged(f"member name {data!r} is not UTF-8")

    def _check_safe(self, name: str, kind: bytes) -> None:
        if kind in _LINKS:
            problem = f"member {name!r} is {_LINKS[kind]}; a shard holds plain files only"
            raise TarProblem(self.path, "member_link", name, problem)
        if kind not in _FILES and kind != _DIRECTORY:
            what = _SPECIAL.get(kind, f"of unknown type {kind!r}")
            problem = f"member {name!r} is {what}; a shard holds plain files only"
            raise TarProblem(self.path, "member_special", name, problem)
        if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
            problem = f"unsafe member path {name!r}: must be relative, without '..'"
            raise TarProblem(self.path, "path_unsafe", name, problem)

    def _truncated(self, problem: str, name: str = "") -> NoReturn:
        raise TarProblem(self.path, "shard_truncated", name, problem)

    def _damaged(self, problem: str) -> NoReturn:
        raise TarProblem(self.path, "shard_damaged", "", problem)
