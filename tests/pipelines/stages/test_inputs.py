"""Tests of pipelines.stages.inputs: what later stages read out of manifests."""

from pathlib import Path

import pytest

from pipelines.recipe import Encoder
from pipelines.stage import File, Manifest, Receipt
from pipelines.stages.inputs import (
    embeds_of,
    encoder_config,
    image_shards,
    joined_shards,
    shard_file,
    snapshot_paths,
    stream_configs,
    without,
)
from tests.pipelines.fake_stages import manifest, receipt


def shard(unit: str, split: str, num: int, *, path: str = "") -> Receipt:
    files = (
        File(path=f"{unit}.json", sha256="", num_bytes=1),
        File(path=path or f"{unit}.tar", sha256="", num_bytes=1),
    )
    return receipt(unit, files=files, num_out=num, facts={"split": split, "shard": f"{unit}.tar"})


@pytest.fixture
def ingest(tmp_path: Path) -> Manifest:
    """Two training shards, one of them adopted, an empty one, and one that is held out."""
    return manifest(
        tmp_path / "ingest" / "f0",
        shard("train-00000", "train", 3),
        shard("train-00001", "train", 0),
        shard("train-00002", "train", 2, path="/elsewhere/x.tar"),
        shard("held-out-00000", "held_out", 1),
    )


@pytest.fixture
def embed(tmp_path: Path) -> Manifest:
    """A cache of text embeddings for every shard that is not empty."""
    widths = {"token_width": 8, "pooled_width": 4}
    return manifest(
        tmp_path / "embed" / "t5" / "f1",
        receipt("null", facts=widths),
        *(shard(unit, "", 1) for unit in ("train-00000", "train-00002", "held-out-00000")),
        stage="embed/t5",
    )


def test_shards_of_a_split(ingest: Manifest) -> None:
    """Empty shards are left out; without a split come all."""
    assert [one.unit for one in image_shards(ingest, "train")] == ["train-00000", "train-00002"]
    assert [one.unit for one in image_shards(ingest, "held_out")] == ["held-out-00000"]
    assert len(list(image_shards(ingest))) == 3


def test_the_shard_is_the_tar_among_the_files(ingest: Manifest) -> None:
    """Whatever else a unit publishes."""
    assert shard_file(ingest.receipt("train-00000")).path == "train-00000.tar"


def test_joined_shards_pair_pictures_with_every_cache(ingest: Manifest, embed: Manifest) -> None:
    """Each shard comes with the same unit's shard of each encoder; adopted ones lie elsewhere."""
    first, second = joined_shards({"ingest": ingest, "embed/t5": embed}, "train")
    assert (first.name, first.num_samples) == ("train-00000.tar", 3)
    assert first.images.location == f"{ingest.directory}/train-00000.tar"
    assert first.embeddings["t5"].location == f"{embed.directory}/train-00000.tar"
    assert second.images.location == "/elsewhere/x.tar"
    assert second.embeddings["t5"].location == f"{embed.directory}/train-00002.tar"


def test_caches_go_by_the_name_of_their_encoder(ingest: Manifest, embed: Manifest) -> None:
    """Other inputs are no caches."""
    assert embeds_of({"ingest": ingest, "embed/t5": embed}) == {"t5": embed}


def test_streams_are_as_wide_as_the_caches_say(embed: Manifest) -> None:
    """Names and dropout come from the recipe, widths from the cache, tokens from the family."""
    text = Encoder(family="open_clip_text", weights="w", dropout=0.25)
    image = Encoder(family="open_clip_image", weights="w", dropout=0.9)
    inputs = {"embed/clip_text": embed, "embed/clip_image": embed}
    one, other = stream_configs({"clip_text": text, "clip_image": image}, inputs)
    assert (one.name, one.token_width, one.pooled_width) == ("clip_text", 8, 4)
    assert (one.dropout, one.pooled_as_token) == (0.25, False)
    assert (other.name, other.dropout, other.pooled_as_token) == ("clip_image", 0.9, True)


def test_encoders_reach_the_library_with_all_their_fields(tmp_path: Path) -> None:
    """What the recipe says is passed on; `fitted` becomes the directory of the fitted CLIP."""
    encoder = Encoder(family="open_clip_text", weights="tag", model="ViT", max_tokens=9, pad="keep")
    config = encoder_config(encoder, {})
    assert (config.weights, config.model, config.max_tokens, config.pad) == (
        *("tag", "ViT", 9),
        "keep",
    )
    fitted = encoder.model_copy(update={"weights": "fitted", "model": ""})
    clip_fit = manifest(tmp_path / "f2", stage="clip_fit")
    assert encoder_config(fitted, {"clip_fit": clip_fit}).weights == str(tmp_path / "f2" / "clip")


def test_snapshots_lie_under_their_units(tmp_path: Path) -> None:
    """One directory an expert."""
    experts = manifest(tmp_path, receipt("low"), receipt("high"))
    assert snapshot_paths(experts) == {"low": tmp_path / "low", "high": tmp_path / "high"}


def test_without_leaves_the_original_alone() -> None:
    """Names that are not there do no harm."""
    values = {"a": 1, "b": 2}
    assert without(values, ["b", "c"]) == {"a": 1}
    assert values == {"a": 1, "b": 2}
