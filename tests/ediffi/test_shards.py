"""Pictures, captions and embeddings meet by key, or an error names who is missing."""

import hashlib
import multiprocessing
import os
import pickle
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import ediffi.shards
from ediffi.encoding.quantization import quantize_tokens
from ediffi.shards import (
    JoinedShards,
    ShardError,
    ShardFile,
    ShardRef,
    ShardWriter,
    encode_tensors,
)
from ediffi.storage import remote
from ediffi.storage.local_cache import LocalCache
from ediffi.storage.tar_index import INDEX_SUFFIX, TarIndex, write_index

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
    embeddings = {}
    for stream in STREAMS:
        kept = [n for n in numbers if n not in without.get(stream, ())]
        members = {f"k{n}": {"safetensors": encode_tensors(embedding_of(stream, n))} for n in kept}
        embeddings[stream] = ShardFile(write_tar(root / stream / name, members))
    images = write_tar(root / "images" / name, {f"k{n}": image_members(n) for n in numbers})
    return ShardRef(
        name=name, images=ShardFile(images), embeddings=embeddings, num_samples=len(numbers)
    )


@pytest.fixture
def shards(tmp_path: Path) -> list[ShardRef]:
    """Three shards of 3, 0 and 4 samples: numbers 0 to 6."""
    ranges = [range(3), range(0), range(3, 7)]
    return [write_shard(tmp_path, f"{i}.tar", numbers) for i, numbers in enumerate(ranges)]


def open_images(root: Path, samples: dict[str, dict[str, bytes]], num_samples: int = 1):
    path = write_tar(root / "images.tar", samples)
    ref = ShardRef(name="0.tar", images=ShardFile(path), embeddings={}, num_samples=num_samples)
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
    path = shards[2].embeddings["t5"].location
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
    images = write_tar(shard.images.location, {f"k{n}": image_members(n) for n in (0, 2)})
    shard = ShardRef(
        name="0.tar",
        images=ShardFile(images),
        embeddings=shard.embeddings,
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
    write_tar(shard.embeddings["t5"].location, {"k0": members})
    with pytest.raises(ShardError, match=message):
        JoinedShards([shard], image_px=4)[0]


@pytest.mark.parametrize("num_bytes", [0, 700, 1024])
def test_torn_embeddings_are_refused(shards, num_bytes):
    """An empty tar, one cut inside a member and one cut between members are errors here too."""
    path = shards[0].embeddings["clip_image"].location
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
    assert len(pickle.dumps(dataset)) < 2000
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
def test_handles_are_lazy_bounded_and_closable(shards, tmp_path):
    """No file is open before its first sample, at most the bound later, none after close."""
    dataset = JoinedShards(shards, image_px=4, max_open_shards=1)
    assert open_tars(tmp_path) == set()
    dataset[0]
    assert len(open_tars(tmp_path)) == 3
    dataset[6]
    assert len(open_tars(tmp_path)) == 3
    dataset.close()
    assert open_tars(tmp_path) == set()
    assert dataset[3].key == "k3"


def test_headers_are_scanned_once(shards, monkeypatch):
    """After the first sample of a shard, reading it never scans the tar again."""
    scans = []
    scan = TarIndex.scan
    monkeypatch.setattr(TarIndex, "scan", lambda tar: scans.append(tar.path) or scan(tar))
    dataset = JoinedShards(shards, image_px=4)
    for index in (0, 1, 2, 0):
        dataset[index]
    assert sorted(scans) == sorted(file.location for file in shards[0].files())


def test_shards_must_share_their_streams(shards):
    """The message names two shards that differ."""
    odd = ShardRef(name="x.tar", images=ShardFile("x"), embeddings={}, num_samples=1)
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
        ShardRef(name="x", images=ShardFile("x"), embeddings={}, num_samples=-1)


def recorded(path: Path, index: bool = True) -> ShardFile:
    """A tar with everything that a receipt knows of it, and its sidecar."""
    index_path = path.with_suffix(INDEX_SUFFIX)
    write_index(path, index_path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return ShardFile(path, path.stat().st_size, sha256, index_path if index else None)


def recorded_shard(shard: ShardRef, index: bool = True) -> ShardRef:
    return ShardRef(
        name=shard.name,
        images=recorded(shard.images.location, index),
        embeddings={name: recorded(f.location, index) for name, f in shard.embeddings.items()},
        num_samples=shard.num_samples,
    )


def equal(a: ediffi.shards.Sample, b: ediffi.shards.Sample) -> bool:
    tensors = [
        (x, b.streams[stream][name])
        for stream, parts in a.streams.items()
        for name, x in parts.items()
    ]
    return (
        (a.key, a.caption, a.streams.keys()) == (b.key, b.caption, b.streams.keys())
        and torch.equal(a.image, b.image)
        and all(torch.equal(x, y) for x, y in tensors)
    )


def test_sidecars_replace_the_scan(shards, monkeypatch):
    """With sidecars no header is read, and the samples are the same."""
    expected = list(JoinedShards(shards, image_px=4))
    refs = [recorded_shard(shard) for shard in shards]
    monkeypatch.setattr(TarIndex, "scan", None)
    found = JoinedShards(refs, image_px=4)
    assert all(map(equal, found, expected))


def test_unfit_sidecar_is_told_and_scanned_around(shards):
    """A sidecar of another tar, or none at its place, costs a warning and a scan."""
    refs = [recorded_shard(shard) for shard in shards]
    refs[0].images.index_location.write_bytes(refs[2].images.index_location.read_bytes())
    refs[2].images.index_location.unlink()
    dataset = JoinedShards(refs, image_px=4)
    with pytest.warns(UserWarning, match=r"0\.index\.json: index of another tar"):
        assert dataset[0].key == "k0"
    with pytest.warns(UserWarning, match=r"2\.index\.json.*no sidecar"):
        assert dataset[6].key == "k6"


def test_batch_is_read_as_its_samples_are(shards):
    """`__getitems__` gives in order what single reads give, across shards."""
    dataset = JoinedShards(shards, image_px=4)
    batch = dataset.__getitems__([6, 0, 3, 0])
    assert all(equal(a, dataset[i]) for a, i in zip(batch, [6, 0, 3, 0], strict=True))
    with pytest.raises(IndexError, match="got 7"):
        dataset.__getitems__([0, 7])


def test_int8_tokens_come_back_as_bf16(shards):
    """A cache stored in int8 reads as tokens near those that were stored."""
    tokens_TD = torch.randn(5, 16)
    steps, scale = quantize_tokens(tokens_TD)
    path = shards[0].embeddings["t5"].location
    members = {"tokens": steps, "tokens_scale": scale}
    write_tar(path, {f"k{n}": {"safetensors": encode_tensors(members)} for n in range(3)})
    found = JoinedShards(shards, image_px=4)[1].streams["t5"]
    assert found.keys() == {"tokens"}
    assert found["tokens"].dtype == torch.bfloat16
    assert torch.allclose(found["tokens"].float(), tokens_TD, atol=0.05)


def test_empty_embedding_is_damage_not_absence(shards):
    """A member of zero bytes is an error under every policy: only a missing one is missing."""
    path = shards[0].embeddings["t5"].location
    write_tar(path, {f"k{n}": {"safetensors": b""} for n in range(3)})
    with pytest.raises(ShardError, match="embedding of 'k0': not a safetensors member"):
        JoinedShards(shards, image_px=4, missing="null")[0]


def put_shard(shard: ShardRef, url: str) -> ShardRef:
    """Copy a recorded shard to a store."""

    def put(file: ShardFile, folder: str) -> ShardFile:
        urls = [f"{url}/{folder}/{Path(p).name}" for p in (file.location, file.index_location)]
        for path, target in zip((file.location, file.index_location), urls):
            file_system, key = fsspec.core.url_to_fs(target)
            file_system.pipe_file(key, Path(path).read_bytes())
        return ShardFile(urls[0], file.num_bytes, file.sha256, urls[1])

    return ShardRef(
        name=shard.name,
        images=put(shard.images, "images"),
        embeddings={name: put(file, name) for name, file in shard.embeddings.items()},
        num_samples=shard.num_samples,
    )


@pytest.fixture
def remote_shards(shards, s3_store) -> list[ShardRef]:
    return [put_shard(recorded_shard(shard), s3_store) for shard in shards]


def wait_for_files(cache: LocalCache, num_files: int) -> None:
    for _ in range(200):
        if len([p for p in cache.directory.glob("??/*") if p.suffix != ".partial"]) >= num_files:
            return
        time.sleep(0.05)
    raise AssertionError(f"fewer than {num_files} files arrived in {cache.directory}")


def test_remote_shards_read_like_local_ones(shards, remote_shards, tmp_path, monkeypatch):
    """Over S3 the samples are the same: by ranges at first, then from the cache."""
    expected = list(JoinedShards(shards, image_px=4))
    cache = LocalCache(tmp_path / "cache", 1 << 20)
    dataset = JoinedShards(remote_shards, image_px=4, cache=cache)
    assert all(map(equal, dataset.__getitems__(range(7)), expected))
    wait_for_files(cache, num_files=6)
    again = JoinedShards(remote_shards, image_px=4, cache=cache)
    monkeypatch.setattr(remote, "read_ranges", None)
    assert all(map(equal, again.__getitems__(range(7)), expected))


def test_remote_tar_larger_than_the_cache_is_read_by_ranges(shards, remote_shards, tmp_path):
    """Nothing is fetched whole that could not be kept."""
    cache = LocalCache(tmp_path / "cache", 1000)
    dataset = JoinedShards(remote_shards, image_px=4, cache=cache)
    assert all(map(equal, dataset, JoinedShards(shards, image_px=4)))
    assert not cache.directory.exists()


def test_remote_tar_without_sidecar_is_fetched_and_scanned(shards, remote_shards, tmp_path):
    """A foreign tar in a store has no sidecar: it is fetched before its first sample."""
    refs = [
        replace(
            shard,
            images=replace(shard.images, index_location=None),
            embeddings={
                name: replace(file, index_location=None) for name, file in shard.embeddings.items()
            },
        )
        for shard in remote_shards
    ]
    dataset = JoinedShards(refs, image_px=4, cache=LocalCache(tmp_path / "cache", 1 << 20))
    assert all(map(equal, dataset, JoinedShards(shards, image_px=4)))


def test_wrong_remote_tar_is_noticed(remote_shards, tmp_path):
    """A tar of the right size and of other bytes is an error once it is here."""
    file = remote_shards[0].embeddings["t5"]
    wrong = replace(file, sha256="00" * 32, index_location=file.index_location)
    shard = replace(remote_shards[0], embeddings={**remote_shards[0].embeddings, "t5": wrong})
    dataset = JoinedShards([shard], image_px=4, cache=LocalCache(tmp_path / "cache", 1 << 20))
    with pytest.warns(UserWarning, match="sha256"), pytest.raises(OSError, match="recorded 0000"):
        dataset[0]


def test_forked_workers_read_remote_shards(shards, remote_shards, tmp_path):
    """Workers forked after their parent used the store open it anew and read the same."""
    dataset = JoinedShards(remote_shards, image_px=4, cache=LocalCache(tmp_path / "cache", 1 << 20))
    expected = [list_of([dataset[i]]) for i in range(7)]
    loader = DataLoader(dataset, batch_size=1, collate_fn=list_of, num_workers=2)
    assert list(loader) == expected


@pytest.mark.parametrize("place", ["local", "remote"])
def test_files_are_held_against_their_records(shards, remote_shards, place, request):
    """At the start: a missing file and one of another size are named, and how many there are."""
    good = remote_shards if place == "remote" else [recorded_shard(shard) for shard in shards]
    JoinedShards(good, image_px=4, verify="all")
    size = good[0].images.num_bytes
    longer = replace(good[0], images=replace(good[0].images, num_bytes=size + 1))
    with pytest.raises(ShardError, match=rf"0\.tar: {size} bytes found, {size + 1} recorded"):
        JoinedShards([longer, *good[1:]], image_px=4, verify="sizes")
    nowhere = f"{good[0].images.location}.nowhere.tar"
    gone = replace(longer, images=replace(longer.images, location=nowhere))
    with pytest.raises(ShardError, match=r"nowhere\.tar: \d+ bytes recorded, no such file"):
        JoinedShards([gone, *good[1:]], image_px=4)
    with pytest.raises(ShardError, match=r"\(2 of 9 files differ\)"):
        JoinedShards([gone, longer, good[1]], image_px=4)


@pytest.mark.parametrize("place", ["local", "remote"])
def test_digests_are_compared_as_asked(shards, remote_shards, place):
    """`sizes` reads no file, `all` reads every one; bytes changed in place are found."""
    good = remote_shards if place == "remote" else [recorded_shard(shard) for shard in shards]
    t5 = replace(good[2].embeddings["t5"], sha256="00" * 32)
    bad = [*good[:2], replace(good[2], embeddings={**good[2].embeddings, "t5": t5})]
    JoinedShards(bad, image_px=4, verify="sizes")
    with pytest.raises(ShardError, match=r"t5/2\.tar: sha256 [0-9a-f]{64} found, 0000"):
        JoinedShards(bad, image_px=4, verify="all")
    with pytest.raises(ValueError, match="verify must be one of sizes, sample, all, got 'some'"):
        JoinedShards(bad, image_px=4, verify="some")


def test_sampled_digests_depend_on_the_seed(shards):
    """`sample` hashes at most four files, others for other seeds, so that runs cover them all."""
    good = [recorded_shard(shard) for shard in shards]
    images = replace(good[0].images, sha256="00" * 32)
    bad = [replace(good[0], images=images), *good[1:]]
    found = []
    for seed in range(20):
        try:
            JoinedShards(bad, image_px=4, verify_seed=seed)
        except ShardError:
            found.append(seed)
    assert 0 < len(found) < 20


def test_memory_does_not_grow_with_shards_touched(tmp_path):
    """Two hundred shards read in turn hold no more than thirty-two of them."""
    refs = [write_shard(tmp_path, f"{i}.tar", range(i, i + 1)) for i in range(200)]
    dataset = JoinedShards(refs, image_px=4)
    for i in range(200):
        assert dataset[i].key == f"k{i}"
    assert dataset._open_shard.cache_info().currsize == 32
