"""Tests of pipelines.store.fingerprint: stable addresses, and words for what changed."""

import hashlib
from pathlib import Path

import pytest

from pipelines.store.fingerprint import canonical, changes, file_sha256, fingerprint, flatten
from tests.pipelines.fake_stages import FakeStage


def test_equal_values_give_equal_bytes() -> None:
    """Neither the order of keys nor tuples against lists change the address."""
    assert canonical({"b": 1, "a": (1, 2)}) == canonical({"a": [1, 2], "b": 1})
    assert canonical({"a": 1}) == b'{"a":1}'


def test_only_json_has_an_address() -> None:
    """A path or an infinity in an identity is a mistake of ours, never hashed by its looks."""
    with pytest.raises(TypeError):
        canonical({"path": Path("x")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"sigma_max": float("inf")})


def test_fingerprint_never_changes_by_itself() -> None:
    """A known stage keeps its address for ever: stores outlive versions of the code."""
    stage = FakeStage(name="embed/t5", setting={"max_tokens": 77})
    document = (
        b'{"identity":{"setting":{"max_tokens":77}},"inputs":{"ingest":"0123456789abcdef"},'
        b'"stage":"embed/t5","version":1}'
    )
    address = fingerprint(stage, {"ingest": "0123456789abcdef"})
    assert address == "0b78337e9b54a72b"
    assert address == hashlib.sha256(document).hexdigest()[:16]


def test_whatever_can_change_bytes_changes_the_fingerprint() -> None:
    """Name, settings and inputs of a stage all count; how its units behave does not."""
    stages = [
        FakeStage(name="a"),
        FakeStage(name="b"),
        FakeStage(name="a", setting=1),
    ]
    addresses = {fingerprint(stage, {}) for stage in stages}
    addresses.add(fingerprint(stages[0], {"x": "0"}))
    addresses.add(fingerprint(stages[0], {"x": "1"}))
    assert len(addresses) == 5
    assert fingerprint(FakeStage(name="a", behaviour={"a": "fails"}), {}) in addresses


def test_changes_name_every_leaf_that_differs() -> None:
    """Changed, new and vanished values are told by their dotted names, in order."""
    before = {"train": {"lr": 0.1, "seed": 0}, "old": "x"}
    after = {"train": {"lr": 0.3, "seed": 0}, "new": [1, 2]}
    assert changes(before, after) == [
        "new: absent -> [1, 2]",
        'old: "x" -> absent',
        "train.lr: 0.1 -> 0.3",
    ]


def test_changes_see_what_is_too_long_to_show() -> None:
    """Two long values that begin alike differ, although what is shown of them does not."""
    (line,) = changes({"prompts": ["x" * 70 + "a"]}, {"prompts": ["x" * 70 + "b"]})
    assert line.startswith('prompts: ["xxx')
    assert len(line) < 140


def test_flatten_keeps_empty_mappings() -> None:
    """A mapping that became empty is a value, not nothing."""
    assert dict(flatten({"a": {}, "b": {"c": 1}})) == {"a": {}, "b.c": 1}


def test_digest_of_a_file(tmp_path: Path) -> None:
    """Digests are plain sha256, as `sha256sum` prints them."""
    (tmp_path / "f").write_bytes(b"abc")
    assert file_sha256(tmp_path / "f") == hashlib.sha256(b"abc").hexdigest()
