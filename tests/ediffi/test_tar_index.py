"""Torn, damaged and hostile tars are refused by name; sound ones of every dialect are read."""

import io
import tarfile
from pathlib import Path

import pytest

from ediffi.tar_index import MappedTar, ShardError, split_member_name

BLOCK = 512


def tar_bytes(*members: tarfile.TarInfo | tuple[str, bytes], format: int = tarfile.USTAR_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def index_of(path: Path, data: bytes) -> dict[str, dict[str, bytes]]:
    path.write_bytes(data)
    tar = MappedTar(path)
    return {
        key: {extension: tar.read(span) for extension, span in members.items()}
        for key, members in tar.index().items()
    }


def with_checksum(header: bytes) -> bytes:
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "00042.tar"


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("000.png", ("000", "png")),
        ("a/b.c/000.seg.PNG", ("a/b.c/000", "seg.png")),
        ("./000.txt", ("./000", "txt")),
        ("Ünï.txt", ("Ünï", "txt")),
        ("no_extension", None),
        ("dir.d/no_extension", None),
        ("__meta__/index.json", None),
    ],
)
def test_member_names_split_as_webdataset_splits_them(name, split):
    """Key and extension agree with webdataset's own functions."""
    from webdataset.tariterators import base_plus_ext

    assert split_member_name(name) == split
    if not name.startswith("__"):
        prefix, suffix = base_plus_ext(name)
        assert split == (None if prefix is None else (prefix, suffix.lower()))


@pytest.mark.parametrize("name", [".DS_Store", "a/._000.png", ".png"])
def test_hidden_files_belong_to_no_sample(name):
    """Litter of file managers does not become a sample."""
    assert split_member_name(name) is None


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_dialect_is_read(path, format):
    """Long names, directories, non-ASCII names and extra members are read in all three dialects."""
    long_key = "d" * 70 + "/" + "k" * 60
    directory = tarfile.TarInfo("some/dir")
    directory.type = tarfile.DIRTYPE
    members = [(f"{long_key}.txt", b"x" * 700), ("é.cls", b"7"), ("é.json", b"{}"), ("README", b"")]
    assert index_of(path, tar_bytes(directory, *members, format=format)) == {
        long_key: {"txt": b"x" * 700},
        "é": {"cls": b"7", "json": b"{}"},
    }


def test_pax_header_beyond_name_limit_is_read(path):
    """A name that fits no USTAR field, where it would break inside a character, is read whole."""
    name = "k" + "é" * 150
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        data = tar_bytes((f"{name}.txt", b"1"), ("b.txt", b"2"), format=format)
        assert index_of(path, data) == {name: {"txt": b"1"}, "b": {"txt": b"2"}}


def test_base_256_size_is_read(path):
    """The GNU binary form of a size, meant for large members, is understood."""
    data = bytearray(tar_bytes(("a.txt", b"hello")))
    data[124:136] = b"\x80" + (5).to_bytes(11, "big")
    data[:BLOCK] = with_checksum(bytes(data[:BLOCK]))
    assert index_of(path, bytes(data)) == {"a": {"txt": b"hello"}}


def test_every_cut_is_noticed(path):
    """A tar cut anywhere before its end is refused; only surplus closing zeros may be missing."""
    whole = tar_bytes(("a.png", b"p" * 600), ("a.txt", b"t"), ("b.png", b"q" * 512))
    end_of_content = BLOCK + 1024 + 2 * BLOCK + 2 * BLOCK
    for num_bytes in range(1, end_of_content + 2 * BLOCK, 97):
        with pytest.raises(ShardError, match=r"cut|empty"):
            index_of(path, whole[:num_bytes])
    assert set(index_of(path, whole[: end_of_content + 2 * BLOCK])) == {"a", "b"}


@pytest.mark.parametrize(
    ("num_bytes", "message"),
    [
        (0, r"00042\.tar: the shard is empty \(0 bytes\)"),
        (300, "cut inside a header at its start"),
        (BLOCK + 100, r"cut inside member 'a\.png': 600 bytes announced, 100 present"),
        (BLOCK + 1024, r"cut on a member boundary after member 'a\.png'"),
        (BLOCK + 1024 + 200, r"cut inside a header after member 'a\.png'"),
        (BLOCK + 1024 + 2 * BLOCK + BLOCK, "only one of the two closing zero blocks"),
    ],
)
def test_cut_is_named(path, num_bytes, message):
    """The message tells where a tar was cut, and after which member."""
    whole = tar_bytes(("a.png", b"p" * 600), ("a.txt", b"t"))
    with pytest.raises(ShardError, match=message):
        index_of(path, whole[:num_bytes])


@pytest.mark.parametrize(
    ("position", "byte"), [(0, b"\xff"), (BLOCK * 2 + 3, b"!"), (BLOCK * 2 + 148, b"9")]
)
def test_damaged_header_is_refused(path, position, byte):
    """A flipped byte in the first or a later header is an error, never a silent end."""
    data = bytearray(tar_bytes(("a.txt", b"1"), ("b.txt", b"2")))
    data[position : position + 1] = byte
    with pytest.raises(ShardError, match="no valid"):
        index_of(path, bytes(data))


def test_foreign_bytes_are_refused(path):
    """Compressed tars and files of any other kind are refused."""
    for data in (b"\x1f\x8b" + b"z" * 2000, b"<html>" * 500):
        with pytest.raises(ShardError, match=r"no valid \(uncompressed\) tar header"):
            index_of(path, data)


def test_data_after_the_end_is_refused(path):
    """Two tars written one after another would lose the second; that is an error."""
    one = tar_bytes(("a.txt", b"1"))
    with pytest.raises(ShardError, match="more data follows the end"):
        index_of(path, one + tar_bytes(("b.txt", b"2")))


@pytest.mark.parametrize(
    "name", ["../a.txt", "a/../../b.txt", "/etc/a.txt", "a/..", "x/" * 80 + "../a.txt"]
)
def test_unsafe_paths_are_refused(path, name):
    """No member may point outside, in short and in long names."""
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with pytest.raises(ShardError, match="unsafe member path"):
            index_of(path, tar_bytes((name, b""), format=format))


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "character device"),
        (tarfile.BLKTYPE, "block device"),
        (tarfile.FIFOTYPE, "FIFO"),
        (tarfile.GNUTYPE_SPARSE, "sparse"),
        (b"Z", "unknown type"),
    ],
)
def test_everything_but_files_is_refused(path, kind, word):
    """Links, devices and exotic members are refused by name."""
    member = tarfile.TarInfo("a.png")
    member.type, member.linkname = kind, "target"
    with pytest.raises(ShardError, match=rf"'a\.png'.*{word}"):
        index_of(path, tar_bytes(member))


def pax_tar(records: bytes, kind: bytes = b"x") -> bytes:
    header = bytearray(tar_bytes(("pax", records))[: BLOCK + -(-len(records) // BLOCK) * BLOCK])
    header[156:157] = kind
    header[:BLOCK] = with_checksum(bytes(header[:BLOCK]))
    return bytes(header) + tar_bytes(("a.txt", b"1"))


@pytest.mark.parametrize(
    ("records", "kind", "message"),
    [
        (b"0 path=b\n", b"x", "damaged pax header"),
        (b"999 path=b\n", b"x", "damaged pax header"),
        (b"9" * 5000 + b" path=b\n", b"x", "damaged pax header"),
        (b"no number", b"x", "damaged pax header"),
        (b"11 size=-1\n", b"x", "damaged pax size"),
        (b"19 size=9999999999\n", b"x", "cut inside member"),
        (b"12 path=/b\0\n", b"x", "unsafe member path"),
        (b"11 path=\xff\xfe\n", b"x", "not UTF-8"),
        (b"22 GNU.sparse.major=1\n", b"x", "sparse"),
        (b"14 path=b.txt\n", b"g", "global pax header"),
        (b"x" * (1 << 20) + b"x", b"x", "too long to be genuine"),
    ],
)
def test_hostile_pax_headers_are_refused(path, records, kind, message):
    """Extended headers that lie, loop or redirect end in a ShardError."""
    with pytest.raises(ShardError, match=message):
        index_of(path, pax_tar(records, kind))


def test_duplicate_and_interleaved_keys_are_refused(path):
    """A key that comes back after another one names itself; so does a repeated member."""
    with pytest.raises(ShardError, match=r"duplicate key 'a'.*follows members of 'b'"):
        index_of(path, tar_bytes(("a.png", b""), ("b.png", b""), ("a.txt", b"")))
    with pytest.raises(ShardError, match=r"duplicate member 'a\.PNG'"):
        index_of(path, tar_bytes(("a.png", b""), ("a.PNG", b"")))


def test_empty_tar_has_no_samples(path):
    """A finished tar without members is a shard of zero samples, not an error."""
    assert index_of(path, tar_bytes()) == {}
