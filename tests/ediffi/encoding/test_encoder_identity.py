"""The identity of an encoder: what changes it, what does not, and how a difference is told."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ediffi.encoding.encoder_identity import (
    CacheMismatch,
    check_identity,
    encoder_identity,
    identity_digest,
    identity_json,
    read_identity,
)
from ediffi.encoding.encoder_weights import EncoderConfig, hub_revision
from tests.tiny_encoders import write_clip, write_t5, write_tokenizer

HUB = EncoderConfig(family="transformers", weights="google/t5-v1_1-xxl")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `t5` and `clip`."""
    folder = tmp_path_factory.mktemp("models")
    write_t5(folder / "t5", ("red", "disk"))
    write_clip(folder / "clip")
    return folder


@pytest.fixture
def t5(models: Path, tmp_path: Path) -> EncoderConfig:
    """A T5 in a folder that the test may change."""
    shutil.copytree(models / "t5", tmp_path / "t5")
    return EncoderConfig(family="transformers", weights=str(tmp_path / "t5"), max_tokens=12)


@pytest.fixture
def clip(models: Path, tmp_path: Path) -> EncoderConfig:
    """The text half of a CLIP in a folder that the test may change."""
    shutil.copytree(models / "clip", tmp_path / "clip")
    return EncoderConfig(family="open_clip_text", weights=str(tmp_path / "clip"))


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before | after if before.get(name) != after.get(name)}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 11),
        ("layer", "penultimate"),
        ("pad", "keep"),
        ("too_long", "reject"),
        ("compute_dtype", "bf16"),
        ("storage_dtype", "int8"),
    ],
)
def test_each_setting_is_a_field_of_its_own(field, value, t5):
    """Changing one setting changes that field and no other."""
    before = encoder_identity(t5)
    after = encoder_identity(replace(t5, **{field: value}))
    assert changed(before, after) == {field}
    assert identity_digest(before) != identity_digest(after)


def test_weights_and_tokenizer_are_told_apart(t5):
    """New weights change `weights`, a new vocabulary `tokenizer`, and notes change nothing."""
    folder = Path(t5.weights)
    before = encoder_identity(t5)
    (folder / "README.md").write_text("trained on sunshine")
    settings = json.loads((folder / "config.json").read_text())
    settings["transformers_version"] = "9.9"
    (folder / "config.json").write_text(json.dumps(settings, indent=7))
    assert encoder_identity(t5) == before
    write_tokenizer(folder, ("red", "cube"))
    assert changed(before, encoder_identity(t5)) == {"tokenizer"}
    tokenizer_changed = encoder_identity(t5)
    settings["layer_norm_epsilon"] = 0.5
    (folder / "config.json").write_text(json.dumps(settings))
    assert changed(tokenizer_changed, encoder_identity(t5)) == {"weights"}
    write_t5(folder, ("red", "disk"), seed=1)
    assert changed(before, encoder_identity(t5)) == {"weights"}


def test_preprocessing_concerns_pictures_alone(clip):
    """A new mean of the pixels makes image embeddings stale, and leaves text embeddings be."""
    image = replace(clip, family="open_clip_image")
    before = encoder_identity(clip), encoder_identity(image)
    path = Path(clip.weights) / "open_clip_config.json"
    settings = json.loads(path.read_text())
    settings["preprocess_cfg"] = {**settings.get("preprocess_cfg", {}), "mean": [0.4, 0.4, 0.4]}
    path.write_text(json.dumps(settings))
    assert encoder_identity(clip) == before[0]
    assert changed(before[1], encoder_identity(image)) == {"preprocessing"}
    assert "max_tokens" not in before[1]
    assert "preprocessing" not in before[0]


def test_the_place_of_a_model_is_no_part_of_it(t5, models):
    """The same files elsewhere are the same encoder."""
    elsewhere = replace(t5, weights=str(models / "t5"))
    assert encoder_identity(elsewhere) == encoder_identity(t5)


def test_names_stand_for_themselves():
    """Hub names, pinned or not, and tags are taken at their word."""
    pinned = replace(HUB, weights=f"{HUB.weights}@3db67ab")
    assert encoder_identity(pinned)["weights"] == "google/t5-v1_1-xxl@3db67ab"
    assert changed(encoder_identity(HUB), encoder_identity(pinned)) == {"weights", "tokenizer"}
    assert hub_revision(pinned) == ("google/t5-v1_1-xxl", "3db67ab")
    assert hub_revision(HUB) == ("google/t5-v1_1-xxl", "")
    tag = EncoderConfig(family="open_clip_image", weights="openai", model="ViT-L-14")
    identity = encoder_identity(tag)
    assert (identity["weights"], identity["model"]) == ("openai", "ViT-L-14")


@pytest.mark.parametrize("weights", ["openai@main", "hf-hub:@main", "hf-hub:timm/vit@"])
def test_only_hub_names_have_revisions(weights):
    """A tag with a revision, or half a pin, is refused with what to write."""
    with pytest.raises(ValueError, match=r"weights must be NAME@REVISION .*hf-hub:OWNER/NAME@"):
        EncoderConfig(family="open_clip_text", weights=weights, model="ViT-L-14")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer", "penultimate"),
        ("pad", "keep"),
        ("too_long", "reject"),
        ("storage_dtype", "int8"),
    ],
)
def test_settings_of_tokens_are_refused_for_pictures(field, value):
    """A setting that would silently do nothing is an error."""
    with pytest.raises(ValueError, match=f"^{field} must be"):
        EncoderConfig(family="open_clip_image", weights="hf-hub:timm/vit", **{field: value})


def test_a_mismatch_names_every_field_and_both_values(t5):
    """The error lists what differs, only that, and says what to do."""
    asked = encoder_identity(t5)
    found = encoder_identity(replace(t5, max_tokens=10, storage_dtype="fp32"))
    check_identity(asked, dict(asked), "here")
    with pytest.raises(CacheMismatch) as caught:
        check_identity(found, asked, "encoders.t5.cache /caches/t5")
    assert str(caught.value).splitlines() == [
        "encoders.t5.cache /caches/t5: made with another encoder than the one asked for",
        "  max_tokens: the cache has 10, asked is 12",
        "  storage_dtype: the cache has 'fp32', asked is 'bf16'",
        "  ask for what the cache has, or embed anew with what is asked",
    ]
    del found["layer"]
    with pytest.raises(CacheMismatch, match="layer: the cache has nothing, asked is 'last'"):
        check_identity(found, asked, "here")


def test_an_identity_is_read_back_from_disk_or_by_url(t5, tmp_path):
    """What is written beside a cache is what is read, from a folder or through fsspec."""
    import fsspec

    identity = encoder_identity(t5)
    (tmp_path / "encoder.json").write_text(identity_json(identity))
    assert read_identity(tmp_path) == identity
    assert read_identity(f"file://{tmp_path}/") == identity
    fsspec.filesystem("memory").pipe_file("/cache/encoder.json", identity_json(identity).encode())
    assert read_identity("memory://cache") == identity


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "must be there in a finished embedding cache, found nothing"),
        ("{", "must be JSON"),
        ("[]", "must be of format 1 with a field `encoder`"),
        ('{"format": 2, "encoder": {}}', "must be of format 1"),
    ],
)
def test_what_is_no_identity_is_refused_by_name(text, message, tmp_path):
    """The error names the file and what was found there."""
    if text is not None:
        (tmp_path / "encoder.json").write_text(text)
    with pytest.raises(ValueError, match=rf"encoder\.json: {message}"):
        read_identity(tmp_path)
