"""Shards are written reproducibly, read back whole, and agree with webdataset."""

import json
import tarfile
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ediffi.storage.shard_format import ShardWriter, decode_tensors, encode_tensors, read_shard
from ediffi.storage.tar_index import ShardError

SAMPLES = {
    "000": {"png": b"\x89PNG", "txt": "grüner Frosch".encode(), "json": b"{}"},
    "001": {"txt": b"", "png": b"x" * 5000},
    "ключ 2": {"safetensors": b"\0" * 1024},
}


def write_samples(path: Path, samples=SAMPLES) -> Path:
    with ShardWriter(path) as writer:
        for key, members in samples.items():
            writer.write(key, members)
    return path


def test_round_trip(tmp_path):
    """What was written is read, in order of the samples."""
    read = list(read_shard(write_samples(tmp_path / "0.tar")))
    assert [key for key, _ in read] == list(SAMPLES)
    assert dict(read) == SAMPLES


def test_equal_samples_give_equal_bytes(tmp_path, monkeypatch):
    """Neither the clock nor the order of members nor the file name enters the bytes."""
    one = write_samples(tmp_path / "one.tar").read_bytes()
    monkeypatch.setattr(time, "time", lambda: 1e9)
    reordered = {key: dict(reversed(members.items())) for key, members in SAMPLES.items()}
    assert write_samples(tmp_path / "two.tar", reordered).read_bytes() == one


def test_header_fields_are_fixed(tmp_path):
    """USTAR, modification time 0, no owner: two blocks per small member."""
    path = write_samples(tmp_path / "0.tar", {"a": {"txt": b"1"}, "b": {"txt": b"2"}})
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == ["a.txt", "b.txt"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
        (0, 0, 0, "", "", 0o444)
    }
    assert [member.offset for member in members] == [0, 1024]


def test_webdataset_reads_our_shards(tmp_path):
    """webdataset sees the same keys, extensions and bytes."""
    import webdataset

    path = write_samples(tmp_path / "0.tar")
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    seen = {s["__key__"]: {e: v for e, v in s.items() if e[0] != "_"} for s in samples}
    assert seen == SAMPLES


def test_we_read_webdataset_shards(tmp_path):
    """Tars by webdataset's own writer, with directories in keys and pickles, are read as bytes."""
    from webdataset import TarWriter

    path = tmp_path / "0.tar"
    bomb = b"cos\nsystem\n(S'exit 1'\ntR."  # would run a command if it were unpickled
    with open(path, "wb") as file, TarWriter(file, encoder=False) as writer:
        writer.write({"__key__": "a/b", "seg.png": b"1", "cls": b"7", "pyd": bomb, "npy": bomb})
    assert list(read_shard(path)) == [
        ("a/b", {"cls": b"7", "npy": bomb, "pyd": bomb, "seg.png": b"1"})
    ]


def test_nothing_is_yielded_from_a_torn_shard(tmp_path):
    """The check of the whole tar comes before the first sample."""
    path = write_samples(tmp_path / "0.tar")
    path.write_bytes(path.read_bytes()[:2048])
    with pytest.raises(ShardError, match=r"0\.tar: cut"):
        next(read_shard(path))


class FailingSamples(dict):
    """Samples whose source breaks after the last one."""

    def items(self):
        yield from super().items()
        raise KeyError


def test_failed_write_leaves_nothing(tmp_path):
    """An exception inside the `with` block leaves neither a shard nor a partial file."""
    with pytest.raises(KeyError):
        write_samples(tmp_path / "0.tar", FailingSamples(SAMPLES))
    assert list(tmp_path.iterdir()) == []


def test_shard_appears_only_when_finished(tmp_path):
    """Until the `with` block ends, the name of the shard does not exist."""
    path = tmp_path / "0.tar"
    with ShardWriter(path) as writer:
        writer.write("a", {"txt": b"1"})
        assert not path.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["0.tar"]


@pytest.mark.parametrize("key", ["", "a/b", "../a", "..", "a.b", "a\0b", "/a", "k" * 97])
def test_writer_refuses_bad_keys(tmp_path, key):
    """Keys that would not come back as they are, or lead elsewhere, are refused."""
    with pytest.raises(ShardError), ShardWriter(tmp_path / "0.tar") as writer:
        writer.write(key, {"txt": b""})


@pytest.mark.parametrize("members", [{}, {"": b""}, {"PNG": b""}, {"a/b": b""}, {"_txt": b""}])
def test_writer_refuses_bad_members(tmp_path, members):
    """Members that webdataset would drop or rename are refused."""
    with pytest.raises(ShardError, match="'a"), ShardWriter(tmp_path / "0.tar") as writer:
        writer.write("a", members)


def test_writer_refuses_duplicate_keys(tmp_path):
    """The second sample of the same key is refused by name."""
    with ShardWriter(tmp_path / "0.tar") as writer:
        writer.write("a", {"txt": b"1"})
        with pytest.raises(ShardError, match="duplicate key 'a'"):
            writer.write("a", {"png": b"1"})


def test_tensors_round_trip_with_their_dtypes():
    """bf16, fp32, views and tensors of zero tokens survive bit by bit."""
    tokens_TD = torch.randn(7, 6).to(torch.bfloat16)
    tensors = {"tokens": tokens_TD[:, ::2], "pooled": torch.randn(4), "none": torch.zeros(0, 3)}
    decoded = decode_tensors(encode_tensors(tensors))
    assert decoded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert decoded[name].dtype == tensor.dtype
        assert torch.equal(decoded[name], tensor)


def test_equal_tensors_give_equal_bytes():
    """The order of the names does not enter the bytes."""
    a, b = torch.randn(3), torch.randn(2, 2)
    assert encode_tensors({"a": a, "b": b}) == encode_tensors({"b": b.clone(), "a": a})


@pytest.mark.parametrize("damage", [lambda d: b"", lambda d: d[:-1], lambda d: b"\x80\x04K\x01."])
def test_damaged_tensors_are_refused(damage):
    """Empty, cut and pickled bytes end in a ShardError."""
    with pytest.raises(ShardError, match="not a safetensors member"):
        decode_tensors(damage(encode_tensors({"a": torch.ones(3)})))


def member(header: object, num_bytes: int) -> bytes:
    """A safetensors member with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(num_bytes)


def entry(dtype: str, shape: object, *offsets: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 8,
        b"\xff" * 40,
        member(b"{", 0),
        member([], 0),
        member({"a": entry("F32", [2], 0, 8)}, 7),
        member({"a": entry("F32", [2], 0, 8)}, 9),
        member({"a": entry("F32", [2], 0, 4)}, 4),
        member({"a": entry("F32", [2], 4, 12)}, 12),
        member({"a": entry("F32", [-1, -2], 0, 8)}, 8),
        member({"a": entry("F32", [2.5], 0, 8)}, 8),
        member({"a": entry("F32", "2", 0, 8)}, 8),
        member({"a": entry("PICKLE", [2], 0, 8)}, 8),
        member({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 4, 8)}, 8),
        member({"a": entry("F32", [1 << 62, 4], 0, 1 << 66)}, 8),
        member({"a": None}, 0),
        member(b"[" * 100_000, 0),
    ],
)
def test_lying_headers_are_refused(data):
    """Overlaps, holes, wrong sizes, unknown types and nonsense end in a ShardError."""
    with pytest.raises(ShardError, match="not a safetensors member"):
        decode_tensors(data)


def test_every_stored_type_is_read_as_the_library_reads_it():
    """Our reading agrees with safetensors' own for all types, scalars and metadata."""
    tensors = {
        str(dtype): torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    }
    tensors |= {str(d): torch.randn(3, 1).to(d) for d in (torch.half, torch.bfloat16, torch.double)}
    tensors["scalar"] = torch.tensor(3.5)
    data = safetensors.torch.save(tensors, metadata={"about": "nothing"})
    expected = safetensors.torch.load(data)
    found = decode_tensors(data)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_tensors_can_be_changed_without_harm():
    """What is read is the reader's own: changing it leaves the bytes as they were."""
    data = encode_tensors({"a": torch.ones(3)})
    decode_tensors(data)["a"].zero_()
    assert decode_tensors(data)["a"].tolist() == [1, 1, 1]
