"""The local cache verifies what it fetches, keeps its limit, and serves many processes."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
from pathlib import Path

import fsspec
import pytest

from ediffi.storage import remote
from ediffi.storage.local_cache import CacheError, DigestMismatch, LocalCache


def put(url: str, data: bytes) -> tuple[str, str, int]:
    """Store an object; returns its address, digest and size."""
    file_system, path = fsspec.core.url_to_fs(url)
    file_system.pipe_file(path, data)
    return url, hashlib.sha256(data).hexdigest(), len(data)


def fetch(cache: LocalCache, item: tuple[str, str, int]) -> Path:
    return cache.fetch(item[0], sha256=item[1], num_bytes=item[2])


@pytest.fixture
def store(request: pytest.FixtureRequest) -> str:
    """A folder in memory: quick, and enough for what does not depend on the protocol."""
    return f"memory://{request.node.name}"


def cached_files(cache: LocalCache) -> list[Path]:
    return [path for path in cache.directory.glob("??/*") if path.is_file()]


def test_file_is_fetched_once(s3_store: str, tmp_path: Path, monkeypatch) -> None:
    """The second time, and under another address, the file is there without a request."""
    cache = LocalCache(tmp_path / "cache", 1 << 20)
    item = put(f"{s3_store}/a.tar", b"x" * 1000)
    path = fetch(cache, item)
    assert path.read_bytes() == b"x" * 1000
    monkeypatch.setattr(remote, "chunks", None)
    assert fetch(cache, item) == path
    assert fetch(cache, ("s3://elsewhere/b.tar", *item[1:])) == path
    assert cache.find(sha256=item[1], num_bytes=1000) == path
    assert cache.find(sha256="0" * 64, num_bytes=1000) is None


def test_large_file_comes_in_pieces(store: str, tmp_path: Path, monkeypatch) -> None:
    """Pieces are put together in their order, the last one shorter."""
    monkeypatch.setattr(remote, "_CHUNK_BYTES", 7)
    data = bytes(range(100))
    item = put(f"{store}/a", data)
    assert fetch(LocalCache(tmp_path, 1000), item).read_bytes() == data


def test_wrong_digest_is_refused_and_not_kept(store: str, tmp_path: Path) -> None:
    """A file that is not the recorded one is an error naming file, required and found."""
    cache = LocalCache(tmp_path, 1000)
    url, sha256, _ = put(f"{store}/a.tar", b"other")
    with pytest.raises(DigestMismatch, match=rf"a\.tar: sha256 {sha256}, recorded 00"):
        cache.fetch(url, sha256="00" * 32, num_bytes=5)
    assert cached_files(cache) == []


@pytest.mark.parametrize("num_bytes", [9, 3])
def test_wrong_size_is_refused(store: str, tmp_path: Path, num_bytes: int) -> None:
    """Longer and shorter files than recorded are errors, with and without a digest."""
    cache = LocalCache(tmp_path, 1000)
    url, sha256, _ = put(f"{store}/a.tar", b"other")
    with pytest.raises(OSError, match=r"a\.tar: .*recorded"):
        cache.fetch(url, sha256=sha256, num_bytes=num_bytes)
    with pytest.raises(DigestMismatch, match=rf"a\.tar: bytes 5, recorded {num_bytes}"):
        cache.fetch(url, sha256="", num_bytes=num_bytes)


def test_missing_file_is_named(s3_store: str, tmp_path: Path) -> None:
    """What is not in the store is a FileNotFoundError with its address."""
    cache = LocalCache(tmp_path, 1000)
    for sha256 in ("", "00" * 32):
        with pytest.raises(FileNotFoundError, match=r"nothing\.tar"):
            cache.fetch(f"{s3_store}/nothing.tar", sha256=sha256, num_bytes=9)


def test_file_without_a_digest_is_fetched_again_when_it_changed(
    s3_store: str, tmp_path: Path
) -> None:
    """The store's ETag stands in for an unknown digest."""
    cache = LocalCache(tmp_path, 1000)
    url, _, _ = put(f"{s3_store}/a", b"one")
    first = cache.fetch(url, sha256="", num_bytes=0)
    assert cache.fetch(url, sha256="", num_bytes=0) == first
    put(url, b"two")
    assert cache.fetch(url, sha256="", num_bytes=0).read_bytes() == b"two"


def test_least_recently_used_goes_first(store: str, tmp_path: Path, monkeypatch) -> None:
    """Files that are neither used lately nor pinned make room; a mapped one reads on."""
    monkeypatch.setattr("ediffi.storage.local_cache._NUM_PINNED", 1)
    cache = LocalCache(tmp_path, 300)
    items = [put(f"{store}/{i}", bytes([i]) * 100) for i in range(4)]
    paths = [fetch(cache, item) for item in items[:3]]
    for age_s, path in enumerate(reversed(paths)):
        os.utime(path, (1000 - age_s, 1000 - age_s))
    fetch(cache, items[0])  # used now
    with paths[1].open("rb") as still_open:
        fetch(cache, items[3])
        assert still_open.read() == b"\1" * 100
    assert [path.exists() for path in paths] == [True, False, True]


def test_limit_holds_but_for_what_is_pinned(store: str, tmp_path: Path, monkeypatch) -> None:
    """Another process's room-making leaves alone what this one fetched last."""
    monkeypatch.setattr("ediffi.storage.local_cache._NUM_PINNED", 2)
    cache, other = LocalCache(tmp_path, 250), LocalCache(tmp_path, 250)
    items = [put(f"{store}/{i}", bytes([i]) * 100) for i in range(6)]
    for item in items[:4]:
        fetch(cache, item)
        assert sum(path.stat().st_size for path in cached_files(cache)) <= 300
    fetch(other, items[4])
    kept = {path.name for path in cached_files(cache)}
    assert {items[2][1], items[3][1], items[4][1]} <= kept


def test_leavings_of_a_crash_make_room(store: str, tmp_path: Path) -> None:
    """A part that a killed process left is dropped like any old file."""
    cache = LocalCache(tmp_path, 150)
    leaving = tmp_path / "ab" / "abc.partial"
    leaving.parent.mkdir()
    leaving.write_bytes(b"x" * 100)
    fetch(cache, put(f"{store}/a", b"y" * 100))
    assert not leaving.exists()


def test_damaged_cached_file_is_fetched_again(store: str, tmp_path: Path) -> None:
    """A file that somebody cut is not handed out."""
    cache = LocalCache(tmp_path, 1000)
    item = put(f"{store}/a", b"whole")
    fetch(cache, item).write_bytes(b"who")
    assert fetch(cache, item).read_bytes() == b"whole"


def test_file_larger_than_the_cache_is_an_error(store: str, tmp_path: Path) -> None:
    """The message names both sizes and the setting."""
    with pytest.raises(CacheError, match=r"100 bytes.*may hold 50; raise EDIFFI_CACHE_GIB"):
        fetch(LocalCache(tmp_path, 50), put(f"{store}/a", b"x" * 100))


def fetch_in_process(cache: LocalCache, item: tuple[str, str, int], results) -> None:
    results.put(fetch(cache, item).read_bytes() == b"z" * 5000)


def test_processes_that_ask_at_once_all_get_it(s3_store: str, tmp_path: Path) -> None:
    """Forked after the parent used the store, four processes fetch the same file, whole."""
    cache = LocalCache(tmp_path, 1 << 20)
    fetch(cache, put(f"{s3_store}/parent", b"p"))
    item = put(f"{s3_store}/a", b"z" * 5000)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=fetch_in_process, args=(cache, item, results)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [True] * 4
    for process in processes:
        process.join(timeout=60)
    assert len(cached_files(cache)) == 2


def test_default_reads_the_environment(monkeypatch, tmp_path: Path) -> None:
    """EDIFFI_CACHE and EDIFFI_CACHE_GIB, with their defaults; nonsense names the variable."""
    monkeypatch.setenv("EDIFFI_CACHE", str(tmp_path))
    monkeypatch.setenv("EDIFFI_CACHE_GIB", "0.5")
    cache = pickle.loads(pickle.dumps(LocalCache.default()))
    assert (cache.directory, cache.max_bytes) == (tmp_path, 1 << 29)
    monkeypatch.delenv("EDIFFI_CACHE")
    monkeypatch.delenv("EDIFFI_CACHE_GIB")
    cache = LocalCache.default()
    assert (cache.directory.parts[-2:], cache.max_bytes) == ((".cache", "ediffi"), 50 << 30)
    for text in ("lots", "0", "-1", "inf"):
        monkeypatch.setenv("EDIFFI_CACHE_GIB", text)
        with pytest.raises(CacheError, match=f"EDIFFI_CACHE_GIB must be.*got '{text}'"):
            LocalCache.default()
