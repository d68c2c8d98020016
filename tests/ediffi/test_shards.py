"""Pictures, captions and embeddings meet by key, or an error names who is missing."""

import multiprocessing
import os
import pickle
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import ediffi.shards
from ediffi.shards import JoinedShards, ShardError, ShardRef, ShardWriter, encode_tensors

STREAMS = ("t5", "clip_image")


def picture_of(number: int, side_px: int = 4) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)


def encoded(pixels_HWC: np.ndarray, format: str = "PNG") -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, format)
    return buffer.getvalue()


def image_members(number: int) -> dict[str, bytes]:
    return {"png": encoded(picture_of(number)), "txt": f"caption {number}".encode()}


def embedding_of(stream: str, number: int) -> dict[str, torch.Tensor]:
    if stream == "clip_image":
        return {"pooled": torch.full((2,), float(number))}
    return {"tokens": torch.full((number % 3, 2), float(number), dtype=torch.bfloat16)}


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with ShardWriter(path) as writer:
        for key, members in samples.items():
            writer.write(key, members)
    return path


def write_shard(root: Path, name: str, numbers: range, without: dict[str, set[int]] | None = None):
    """Write one joined shard; `without` lists samples that lack a stream's embedding."""
    without = without or {}
    embedding_paths = {}
    for stream in STREAMS:
        kept = [n for n in numbers if n not in without.get(stream, ())]
        members = {f"k{n}": {"safetensors": encode_tensors(embedding_of(stream, n))} for n in kept}
        embedding_paths[stream] = write_tar(root / stream / name, members)
    images = write_tar(root / "images" / name, {f"k{n}": image_members(n) for n in numbers})
    return ShardRef(
        name=name, image_path=images, embedding_paths=embedding_paths, num_samples=len(numbers)
    )


@pytest.fixture
def shards(tmp_path: Path) -> list[ShardRef]:
    """Three shards of 3, 0 and 4 samples: numbers 0 to 6."""
    ranges = [range(3), range(0), range(3, 7)]
    return [write_shard(tmp_path, f"{i}.tar", numbers) for i, numbers in enumerate(ranges)]


def open_images(root: Path, samples: dict[str, dict[str, bytes]], num_samples: int = 1):
    path = write_tar(root / "images.tar", samples)
    ref = ShardRef(name="0.tar", image_path=path, embedding_paths={}, num_samples=num_samples)
    return JoinedShards([ref], image_px=4)


def test_samples_are_joined_by_key(shards):
    """Sample i has the picture, the caption and the embeddings of its key, across shards."""
    dataset = JoinedShards(shards, image_px=4)
    assert len(dataset) == 7
    assert dataset.shard_sizes == (3, 0, 4)
    for number, sample in enumerate(dataset):
        assert (sample.key, sample.caption) == (f"k{number}", f"caption {number}")
        assert sample.image.dtype == torch.uint8
        assert np.array_equal(sample.image.permute(1, 2, 0), picture_of(number))
        assert sample.streams.keys() == set(STREAMS)
        for stream, tensors in sample.streams.items():
            for name, tensor in embedding_of(stream, number).items():
                assert torch.equal(tensors[name], tensor)
                assert tensors[name].dtype == tensor.dtype


def test_order_within_embedding_tars_does_not_matter(shards):
    """The join is by key, never by position."""
    path = shards[2].embedding_paths["t5"]
    samples = dict(reversed(list(ediffi.shards.read_shard(path))))
    write_tar(path, samples)
    sample = JoinedShards(shards, image_px=4)[5]
    assert torch.equal(sample.streams["t5"]["tokens"], embedding_of("t5", 5)["tokens"])


@pytest.mark.parametrize("index", [-1, 7])
def test_index_out_of_range(shards, index):
    """Indexes outside the data set are refused, negative ones too."""
    with pytest.raises(IndexError, match=rf"\[0, 7\), got {index}"):
        JoinedShards(shards, image_px=4)[index]


def test_missing_error_names_the_sample(tmp_path):
    """Policy `error`: a picture without embedding names stream, key and remedy."""
    shard = write_shard(tmp_path, "0.tar", range(4), without={"t5": {1, 2}})
    with pytest.raises(ShardError, match=r"no 't5' embedding of 'k1' \(2 of 4.*'skip' or 'null'"):
        JoinedShards([shard], image_px=4)[0]


def test_missing_error_names_the_orphan(tmp_path):
    """Policy `error`: an embedding without picture names stream and key."""
    shard = write_shard(tmp_path, "0.tar", range(3))
    images = write_tar(shard.image_path, {f"k{n}": image_members(n) for n in (0, 2)})
    shard = ShardRef(
        name="0.tar",
        image_path=images,
        embedding_paths=shard.embedding_paths,
        num_samples=2,
    )
    with pytest.raises(ShardError, match="'t5' embedding of 'k1' has no image"):
        JoinedShards([shard], image_px=4)[0]
    assert [s.key for s in JoinedShards([shard], image_px=4, missing="skip")] == ["k0", "k2"]
    assert [s.key for s in JoinedShards([shard], image_px=4, missing="null")] == ["k0", "k2"]


def test_missing_skip_leaves_the_samples_out(tmp_path):
    """Policy `skip`: samples lacking any stream are not counted, the others keep their order."""
    first = write_shard(tmp_path, "0.tar", range(4), without={"t5": {1}, "clip_image": {3}})
    second = write_shard(tmp_path, "1.tar", range(4, 6))
    dataset = JoinedShards([first, second], image_px=4, missing="skip")
    assert dataset.shard_sizes == (2, 2)
    assert [sample.key for sample in dataset] == ["k0", "k2", "k4", "k5"]


def test_missing_null_leaves_the_stream_out(tmp_path):
    """Policy `null`: the sample stays, without the stream it lacks."""
    shard = write_shard(tmp_path, "0.tar", range(3), without={"t5": {1}})
    dataset = JoinedShards([shard], image_px=4, missing="null")
    assert [set(sample.streams) for sample in dataset] == [
        {"t5", "clip_image"},
        {"clip_image"},
        {"t5", "clip_image"},
    ]


def test_number_of_pictures_is_checked(tmp_path):
    """A shard that holds other than its receipt's number of samples is refused."""
    dataset = open_images(tmp_path, {"a": image_members(0)}, num_samples=2)
    with pytest.raises(ShardError, match=r"images\.tar: 1 samples found, 2 recorded"):
        dataset[0]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"png": b"x"}, "image 'a' has no caption: needs a member a.txt"),
        ({"txt": b"x", "json": b"{}"}, "sample 'a' has no image.*found json, txt"),
        ({"png": b"<html>", "txt": b"x"}, "image of 'a': image_undecodable"),
        ({"png": encoded(picture_of(0))[:-30], "txt": b"x"}, "image of 'a': image_truncated"),
        ({"png": encoded(picture_of(0)), "txt": b"\xff"}, "caption of 'a' is not UTF-8"),
    ],
)
def test_bad_sample_names_its_key(tmp_path, members, message):
    """Whatever is wrong with a picture or caption, the message names shard and key."""
    with pytest.raises(ShardError, match=rf"images\.tar: {message}"):
        open_images(tmp_path, {"a": members})[0]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"npy": b"\x93NUMPY", "pkl": b"\x80\x04N."}, r"'k0' has no member k0\.safetensors"),
        ({"safetensors": b"\x80\x04N."}, "embedding of 'k0': not a safetensors member"),
    ],
)
def test_bad_embedding_names_its_key(tmp_path, members, message):
    """Embeddings are safetensors; arrays and pickles are not even opened."""
    shard = write_shard(tmp_path, "0.tar", range(1))
    write_tar(shard.embedding_paths["t5"], {"k0": members})
    with pytest.raises(ShardError, match=message):
        JoinedShards([shard], image_px=4)[0]


@pytest.mark.parametrize("num_bytes", [0, 700, 1024])
def test_torn_embeddings_are_refused(shards, num_bytes):
    """An empty tar, one cut inside a member and one cut between members are errors here too."""
    path = shards[0].embedding_paths["clip_image"]
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ShardError, match=r"clip_image/0\.tar: (cut|the shard is empty)"):
        JoinedShards(shards, image_px=4)[0]


def test_extra_members_and_formats_are_accepted(tmp_path):
    """Tars from elsewhere: other members are ignored, PNG is preferred, JPEG and WebP are read."""
    png, extra = encoded(picture_of(1)), {"json": b"{}", "cls": b"7", "pyd": b"\x80\x04N."}
    dataset = open_images(
        tmp_path,
        {
            "a": {"jpg": b"not looked at", "png": png, "txt": b"1", **extra},
            "b": {"jpeg": encoded(picture_of(1), "JPEG"), "txt": b"2"},
            "c": {"webp": encoded(picture_of(1), "WEBP"), "txt": b"3"},
        },
        num_samples=3,
    )
    assert np.array_equal(dataset[0].image.permute(1, 2, 0), picture_of(1))
    assert [sample.image.shape for sample in dataset] == [(3, 4, 4)] * 3


def test_pictures_are_fitted(tmp_path):
    """Pictures of other sizes come at the size asked for."""
    big = {"png": encoded(picture_of(1, side_px=9)), "txt": b""}
    assert open_images(tmp_path, {"a": big})[0].image.shape == (3, 4, 4)


def test_copy_by_pickle_reads_on(shards):
    """A copy for a spawned worker is small, carries no mapping, and reads the same."""
    dataset = JoinedShards(shards, image_px=4)
    before = dataset[6]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy._indexes == {}
    assert torch.equal(copy[6].image, before.image)


def list_of(samples: list[ediffi.shards.Sample]) -> list[tuple[str, int]]:
    return [(sample.key, int(sample.image.sum())) for sample in samples]


@pytest.mark.parametrize(
    ("start", "num_workers"), [("fork", 2), pytest.param("spawn", 1, marks=pytest.mark.slow)]
)
def test_workers_read_what_one_process_reads(shards, start, num_workers):
    """Forked workers inherit open shards, spawned ones open their own; samples are the same."""
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start} here")
    dataset = JoinedShards(shards, image_px=4)
    expected = [list_of([dataset[i]]) for i in range(7)]
    loader = DataLoader(
        dataset,
        batch_size=1,
        collate_fn=list_of,
        num_workers=num_workers,
        multiprocessing_context=start,
    )
    assert list(loader) == expected


def open_tars(root: Path) -> set[str]:
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    targets = {os.readlink(link) for link in links if os.path.islink(link)}
    return {target for target in targets if target.startswith(str(root))}


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux")
def test_handles_are_lazy_bounded_and_closable(shards, tmp_path, monkeypatch):
    """No file is open before its first sample, at most the bound later, none after close."""
    monkeypatch.setattr(ediffi.shards, "_MAX_MAPPED_TARS", 4)
    dataset = JoinedShards(shards, image_px=4)
    assert open_tars(tmp_path) == set()
    dataset[0]
    assert len(open_tars(tmp_path)) == 3
    dataset[6]
    assert len(open_tars(tmp_path)) == 4
    dataset.close()
    assert open_tars(tmp_path) == set()
    assert dataset[3].key == "k3"


def test_headers_are_scanned_once(shards, monkeypatch):
    """After the first sample of a shard, reading it never scans the tar again."""
    scans = []
    scan = ediffi.shards._scan
    monkeypatch.setattr(ediffi.shards, "_scan", lambda path: scans.append(path) or scan(path))
    dataset = JoinedShards(shards, image_px=4)
    for index in (0, 1, 2, 0):
        dataset[index]
    assert sorted(scans) == sorted([shards[0].image_path, *shards[0].embedding_paths.values()])


def test_shards_must_share_their_streams(shards):
    """The message names two shards that differ."""
    odd = ShardRef(name="x.tar", image_path=Path("x"), embedding_paths={}, num_samples=1)
    with pytest.raises(ValueError, match=r"'0\.tar' has \['clip_image', 't5'\], 'x\.tar' has \[\]"):
        JoinedShards([shards[0], odd], image_px=4)


def test_bad_settings_are_named(shards):
    """Errors name the setting, what was found and the choices."""
    with pytest.raises(ValueError, match="at least one shard"):
        JoinedShards([], image_px=4)
    with pytest.raises(ValueError, match="error, skip, null, got 'drop'"):
        JoinedShards(shards, image_px=4, missing="drop")
    with pytest.raises(ValueError, match="resize must be one of"):
        JoinedShards(shards, image_px=4, resize="crop")
    with pytest.raises(ValueError, match=r"num_samples of shard 'x' must be at least 0, got -1"):
        ShardRef(name="x", image_path=Path("x"), embedding_paths={}, num_samples=-1)
