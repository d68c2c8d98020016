"""Tests of ediffi.caches: folders of pictures and embeddings that do, or do not, fit together."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from ediffi.caches import CacheError, open_caches
from ediffi.encoding.encoder_identity import CacheMismatch, encoder_identity, identity_json
from ediffi.encoding.encoder_weights import EncoderConfig

T5 = EncoderConfig(family="transformers", weights="google/t5-v1_1-small", max_tokens=77)


def receipt(unit: str, *, num_out: int = 3, path: str = "", **facts: Any) -> dict[str, Any]:
    """A line of receipts.jsonl."""
    files = [
        {"path": path or f"{unit}.tar", "sha256": "ab", "num_bytes": 10},
        {"path": f"{unit}.index.json", "sha256": "cd", "num_bytes": 5},
    ]
    return {"unit": unit, "num_out": num_out, "files": files, "facts": facts}


def write_stage(folder: Path, *receipts: dict[str, Any]) -> Path:
    """A finished folder with these receipts."""
    folder.mkdir(parents=True)
    text = "".join(json.dumps(one) + "\n" for one in receipts)
    (folder / "receipts.jsonl").write_text(text)
    contents = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"contents": contents}))
    return folder


def pictures(unit: str, split: str = "train", *, captions: str = "c1", **values: Any) -> Any:
    """The receipt of an image shard."""
    digests = {"captions": captions, "pictures": "p1"}
    return receipt(unit, split=split, shard=f"{unit}.tar", digests=digests, **values)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two training shards, one adopted from elsewhere; an empty one; one held out."""
    return write_stage(
        tmp_path / "images",
        pictures("a"),
        pictures("b", path="/elsewhere/b.tar", num_out=2),
        pictures("c", num_out=0),
        pictures("d", "held_out"),
    )


@pytest.fixture
def t5(tmp_path: Path) -> Path:
    """A text cache of all of them."""
    units = (receipt(unit, shard=f"{unit}.tar", digests={"captions": "c1"}) for unit in "abd")
    folder = write_stage(tmp_path / "t5", receipt("null", digests={}), *units)
    (folder / "encoder.json").write_text(identity_json(encoder_identity(T5)))
    return folder


def test_shards_come_with_their_caches(images: Path, t5: Path) -> None:
    """In order, one split, no empty ones; sizes and digests are those of the receipts."""
    first, second = open_caches(images, {"t5": t5}, asked={"t5": T5})
    assert (first.name, first.num_samples, second.num_samples) == ("a.tar", 3, 2)
    assert first.images.location == f"{images}/a.tar"
    assert first.images.index_location == f"{images}/a.index.json"
    assert (first.embeddings["t5"].num_bytes, first.embeddings["t5"].sha256) == (10, "ab")
    assert second.images.location == "/elsewhere/b.tar"
    (held_out,) = open_caches(images, {"t5": t5}, split="held_out")
    assert held_out.name == "d.tar"


def test_another_encoder_is_refused_by_field(images: Path, t5: Path) -> None:
    """The message names what differs and both values."""
    asked = EncoderConfig(family="transformers", weights="google/t5-v1_1-small", max_tokens=64)
    with pytest.raises(CacheMismatch, match="max_tokens: the cache has 77, asked is 64"):
        open_caches(images, {"t5": t5}, asked={"t5": asked})


def test_an_unfinished_folder_is_refused(images: Path, t5: Path) -> None:
    """Without a manifest nobody knows whether all shards are there."""
    (t5 / "manifest.json").unlink()
    with pytest.raises(
        CacheError, match=r"must be a finished stage, but .*manifest\.json is missing"
    ):
        open_caches(images, {"t5": t5})


def test_receipts_that_are_not_the_manifests_are_refused(images: Path, t5: Path) -> None:
    """A line lost while copying is noticed."""
    lines = (t5 / "receipts.jsonl").read_text().splitlines(keepends=True)
    (t5 / "receipts.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(CacheError, match=r"sha256 must be .* as in manifest\.json"):
        open_caches(images, {"t5": t5})


def test_a_cache_of_other_shards_is_refused(images: Path, tmp_path: Path) -> None:
    """Both for a shard that is missing and for one whose captions have changed since."""
    folder = write_stage(tmp_path / "less", receipt("a", digests={"captions": "c1"}))
    with pytest.raises(CacheError, match=r"t5: no embeddings of b.tar"):
        open_caches(images, {"t5": folder})
    old = (receipt(unit, digests={"captions": "old"}) for unit in "ab")
    folder = write_stage(tmp_path / "old", *old)
    with pytest.raises(CacheError, match=r"t5: a.tar was made of other captions: .*found old"):
        open_caches(images, {"t5": folder})


def test_a_bucket_is_as_good_as_a_directory(images: Path, t5: Path, s3_store: str) -> None:
    """Folders on an object store are named by URL, and so are their shards."""
    import fsspec

    bucket = fsspec.filesystem("s3")
    for folder in (images, t5):
        bucket.put(str(folder), f"{s3_store}/{folder.name}", recursive=True)
    first, _ = open_caches(f"{s3_store}/images", {"t5": f"{s3_store}/t5"}, asked={"t5": T5})
    assert first.embeddings["t5"].location == f"{s3_store}/t5/a.tar"
