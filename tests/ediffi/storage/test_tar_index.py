"""Torn, damaged and hostile tars are refused by name, or salvaged; sound ones are read."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ediffi.storage.tar_index import (
    INDEX_SUFFIX,
    MappedTar,
    ShardError,
    TarIndex,
    read_index,
    salvage,
    split_member_name,
    write_index,
)

BLOCK = 512
KINDS = ("png", "txt")
SAMPLE_BYTES = 2 * 2 * BLOCK  # a header and a block of data for each


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


def sample_tar(*keys: str) -> bytes:
    """A PNG and a caption per key; each takes two blocks for each of its members."""
    return tar_bytes(*[(f"{key}.{kind}", key.encode() * 9) for key in keys for kind in KINDS])


def salvaged(path: Path, data: bytes) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    """Extensions by key of what is whole, and (reason, key) of every problem."""
    path.write_bytes(data)
    found = salvage(path)
    samples = {key: list(members) for key, members in found.samples.items()}
    return samples, [(problem.reason, problem.key) for problem in found.problems]


def test_sound_tar_has_nothing_to_salvage(path):
    """Where `index` accepts a tar, salvage finds the same members and no problem."""
    path.write_bytes(sample_tar("a", "b"))
    found = salvage(path)
    assert found.problems == []
    assert found.samples == MappedTar(path).index()


@pytest.mark.parametrize(
    ("num_bytes", "whole", "problems"),
    [
        (0, "", [("shard_empty", "")]),
        (2 * SAMPLE_BYTES, "ab", [("shard_truncated", "")]),
        (2 * SAMPLE_BYTES + 2 * BLOCK, "ab", [("shard_truncated", ""), ("shard_truncated", "c")]),
        (2 * SAMPLE_BYTES + BLOCK + 3, "ab", [("shard_truncated", "c")]),
        (2 * SAMPLE_BYTES + 3, "ab", [("shard_truncated", "")]),
        (3 * SAMPLE_BYTES + BLOCK, "abc", [("shard_truncated", "")]),
    ],
)
def test_cut_tar_gives_its_whole_samples(path, num_bytes, whole, problems):
    """Cut between samples, between members, inside a member, a header or the end: all is named."""
    samples, found = salvaged(path, sample_tar("a", "b", "c")[:num_bytes])
    assert samples == {key: list(KINDS) for key in whole}
    assert found == problems


def test_damage_loses_its_sample_and_no_other(path):
    """Behind a damaged header the walk goes on; the sample that lost a member is left out."""
    data = bytearray(sample_tar("a", "b", "c"))
    data[SAMPLE_BYTES + 2 * BLOCK] ^= 1  # the name in the header of b.txt
    samples, problems = salvaged(path, bytes(data))
    assert samples == {"a": list(KINDS), "c": list(KINDS)}
    assert problems == [("shard_damaged", ""), ("shard_damaged", "b")]


def test_tar_behind_a_tar_is_found(path):
    """Tars written one after another: the second one's samples are not lost."""
    samples, problems = salvaged(path, sample_tar("a") + sample_tar("b"))
    assert list(samples) == ["a", "b"]
    assert problems == [("shard_damaged", "")]


def test_foreign_file_gives_nothing(path):
    """What never was a tar has no samples and one problem."""
    assert salvaged(path, b"<html>" * 500) == ({}, [("shard_damaged", "")])


def test_hostile_members_lose_their_samples(path):
    """Links, devices and paths that lead elsewhere are named and skipped, with their samples."""
    link, device = tarfile.TarInfo("b.png"), tarfile.TarInfo("c.png")
    link.type, link.linkname, device.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.CHRTYPE
    members = ["a.png", "a.txt", link, "b.txt", device, "c.txt", "../d.txt", "/e.txt", "f.png"]
    data = tar_bytes(*[(m, b"x") if isinstance(m, str) else m for m in members])
    samples, problems = salvaged(path, data)
    assert samples == {"a": ["png", "txt"], "f": ["png"]}
    assert problems == [
        ("member_link", "b"),
        ("member_special", "c"),
        ("path_unsafe", "../d"),
        ("path_unsafe", "/e"),
    ]


def test_first_of_equal_keys_stays(path):
    """Of samples with one key the first is kept whole, never mixed with the others."""
    samples, problems = salvaged(path, sample_tar("a", "b", "a", "c", "c"))
    assert list(samples) == ["a", "b", "c"]
    assert samples["a"] == list(KINDS)
    assert problems == [("duplicate_key", "a"), ("duplicate_member", "c")]
    path.write_bytes(sample_tar("a", "b", "a"))
    assert salvage(path).samples["a"]["png"].offset == BLOCK


def index_round_trip(path: Path, **record: Any) -> TarIndex:
    """Write the sidecar of a tar and read it back against a record."""
    index_path = path.with_suffix(INDEX_SUFFIX)
    write_index(path, index_path)
    settings = {"tar_bytes": 0, "sha256": ""} | record
    return read_index(index_path.read_bytes(), str(index_path), **settings)


def test_sidecar_holds_what_a_scan_finds(path):
    """Keys, spans and size come back; samples without some member are told apart from others."""
    path.write_bytes(tar_bytes(("a.png", b"p" * 600), ("a.txt", b""), ("é.txt", b"2")))
    tar = MappedTar(path)
    scanned = TarIndex.scan(tar)
    found = index_round_trip(path, tar_bytes=len(tar), sha256=tar.sha256())
    assert found.keys == scanned.keys == ["a", "é"]
    assert found.tar_bytes == path.stat().st_size
    assert found.spans.keys() == {"png", "txt"}
    for extension, spans in scanned.spans.items():
        assert np.array_equal(found.column(extension), spans)
    assert found.column("png")[:, 0].tolist() == [BLOCK, 0]
    assert found.column("json").tolist() == [[0, 0], [0, 0]]


def test_sidecar_bytes_are_a_function_of_the_tar(path, tmp_path):
    """Written twice, and of a tar under another name, the sidecar is the same."""
    path.write_bytes(sample_tar("a", "b"))
    other = tmp_path / "other.tar"
    other.write_bytes(path.read_bytes())
    for tar_path in (path, other):
        write_index(tar_path, tar_path.with_suffix(INDEX_SUFFIX))
    first, second = (p.with_suffix(INDEX_SUFFIX).read_bytes() for p in (path, other))
    assert first == second
    assert list(tmp_path.glob("*.partial")) == []


def test_sidecar_of_an_empty_tar_is_empty(path):
    """A shard of zero samples has an index of zero samples."""
    path.write_bytes(tar_bytes())
    assert index_round_trip(path).keys == []


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"tar_bytes": 5}, "index of another tar: num_bytes 10240, required 5"),
        ({"sha256": "ab"}, "index of another tar: sha256 [0-9a-f]{64}, required ab"),
    ],
)
def test_sidecar_of_another_tar_is_refused(path, record, message):
    """Size and digest must be those of the record."""
    path.write_bytes(sample_tar("a"))
    with pytest.raises(ShardError, match=message):
        index_round_trip(path, **record)


def edited(content: dict[str, Any], *names: str, value: object) -> bytes:
    """Replace one value of a sidecar."""
    place = content
    for name in names[:-1]:
        place = place[name]
    place[names[-1]] = value
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("names", "value", "message"),
    [
        (("version",), 2, "index version 2"),
        (("keys",), ["a"], "damaged index"),
        (("keys",), ["a", "a"], "keys must be different texts"),
        (("keys",), [1, 2], "keys must be different texts"),
        (("members", "png", "offset"), [512, 12], "damaged index"),
        (("members", "png", "offset"), [512, 1 << 40], "a member ends behind the tar"),
        (("members", "png", "offset"), [512, 1 << 70], "damaged index"),
        (("members", "png", "num_bytes"), [1, -1], "damaged index"),
        (("members", "png"), [], "damaged index"),
        (("members",), None, "damaged index"),
        (("tar",), "big", "damaged index"),
    ],
)
def test_damaged_sidecar_is_refused(path, names, value, message):
    """No offset that lies outside the tar, and nothing of a wrong kind, is believed."""
    path.write_bytes(sample_tar("a", "b"))
    write_index(path, path.with_suffix(INDEX_SUFFIX))
    content = json.loads(path.with_suffix(INDEX_SUFFIX).read_text())
    with pytest.raises(ShardError, match=message):
        read_index(edited(content, *names, value=value), "x", tar_bytes=0, sha256="")


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"null", b"\xff", b"\x80\x04N."])
def test_foreign_sidecar_is_refused(data):
    """Bytes of any other kind end in a ShardError that names the file."""
    with pytest.raises(ShardError, match=r"0\.index\.json: damaged index"):
        read_index(data, "0.index.json", tar_bytes=0, sha256="")


def test_damage_of_any_kind_is_survived(path):
    """Whatever bytes are changed or cut, salvage ends, and what it gives lies inside the file."""
    whole = sample_tar("a", "b", "c")
    random = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole[: random.integers(1, len(whole) + 1)])
        for position in random.integers(0, len(data), random.integers(0, 4)):
            data[position] = random.integers(0, 256)
        path.write_bytes(data)
        found = salvage(path)
        spans = [span for members in found.samples.values() for span in members.values()]
        assert all(BLOCK <= offset <= offset + size <= len(data) for offset, size in spans)
        assert found.problems or found.samples == MappedTar(path).index()
