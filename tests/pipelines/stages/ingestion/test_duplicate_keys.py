"""Tests of pipelines.stages.ingestion.duplicate_keys."""

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest

from ediffi.storage.tar_index import write_index
from pipelines.stages.ingestion import duplicate_keys
from pipelines.stages.ingestion.duplicate_keys import KEYS_FOLDER, find_duplicates, write_keys
from pipelines.store.location import location
from tests.pipelines.stages.ingest_inputs import write_tar


def publish(directory: Path, shards: Sequence[Sequence[str]]) -> list[str]:
    """Leave what units with these keys leave; the ids of the units."""
    unit_ids = [f"train-{index:05d}" for index in range(len(shards))]
    for unit_id, keys in zip(unit_ids, shards):
        tar = write_tar(directory / f"{unit_id}.tar", {key: {"txt": b""} for key in keys})
        write_index(tar, directory / f"{unit_id}.index.json")
        write_keys(keys, directory / KEYS_FOLDER / f"{unit_id}.u64")
    return unit_ids


@pytest.mark.parametrize("num_keys_sorted", [1, 2, 1000])
def test_the_later_unit_loses(
    tmp_path: Path, num_keys_sorted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key stays in the first unit that has it, however few keys fit into memory at once."""
    monkeypatch.setattr(duplicate_keys, "NUM_KEYS_SORTED", num_keys_sorted)
    shards = [["a", "b", "c"], ["d", "b"], [], ["e", "b", "a", "f", "d"]]
    unit_ids = publish(tmp_path, shards)
    assert find_duplicates(tmp_path, unit_ids, 10) == {1: ["b"], 3: ["b", "a", "d"]}
    assert find_duplicates(tmp_path, unit_ids[:1], 3) == {}
    assert find_duplicates(tmp_path, [], 0) == {}


def test_equal_hashes_of_different_keys_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hash only finds suspects: the keys themselves decide."""
    unit_ids = publish(tmp_path, [["a", "b"], ["c", "a"], ["d"]])
    for unit_id, num_keys in zip(unit_ids, (2, 2, 1)):
        (tmp_path / KEYS_FOLDER / f"{unit_id}.u64").write_bytes(b"\7" * 8 * num_keys)
    assert find_duplicates(tmp_path, unit_ids, 5) == {1: ["a"]}


def test_hashes_and_indexes_may_lie_in_an_object_store(tmp_path: Path, s3_store: str) -> None:
    """The stage's folder may be a URL."""
    unit_ids = publish(tmp_path, [["a", "b"], ["b"]])
    remote = location(s3_store)
    for path in [*tmp_path.glob("*.json"), *(tmp_path / KEYS_FOLDER).iterdir()]:
        (remote / str(path.relative_to(tmp_path))).write_bytes(path.read_bytes())
    assert find_duplicates(remote, unit_ids, 3) == {1: ["b"]}


def test_memory_is_that_of_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the keys are searched in about the same memory."""
    import numpy as np

    monkeypatch.setattr(duplicate_keys, "NUM_KEYS_SORTED", 10_000)
    (tmp_path / KEYS_FOLDER).mkdir()

    def peak_bytes(num_units: int) -> int:
        unit_ids = [f"u{index}" for index in range(num_units)]
        generator = np.random.default_rng(0)
        for unit_id in unit_ids:
            hashes = generator.integers(0, 2**64, 1000, dtype=np.uint64)
            (tmp_path / KEYS_FOLDER / f"{unit_id}.u64").write_bytes(hashes.tobytes())
        tracemalloc.start()
        assert find_duplicates(tmp_path, unit_ids, 1000 * num_units) == {}
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak_bytes(300) < 1.5 * peak_bytes(30)
