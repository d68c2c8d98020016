"""Tests of pipelines.prediction.stream_widths: what is said of an encoder is what it gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ediffi.encoders import load_encoder
from pipelines.prediction.stream_widths import StreamWidths, known_widths, stream_widths
from pipelines.recipe import ClipFit, Encoder
from pipelines.recipe_file import load_recipe
from pipelines.stages.inputs import encoder_config
from tests.pipelines.fake_stages import manifest, receipt
from tests.tiny_encoders import write_clip, write_t5


def as_loaded(encoder: Encoder) -> tuple[int, int]:
    """Widths of the encoder itself."""
    loaded = load_encoder(encoder_config(encoder, {}))
    return loaded.token_width, loaded.pooled_width


def test_weights_on_this_machine_say_what_the_encoder_gives(tmp_path: Path) -> None:
    """Of both families, text and pictures."""
    write_t5(tmp_path / "t5", ("a", "red", "circle"))
    write_clip(tmp_path / "clip")
    for family, folder in (
        ("transformers", "t5"),
        ("open_clip_text", "clip"),
        ("open_clip_image", "clip"),
    ):
        encoder = Encoder(family=family, weights=str(tmp_path / folder))  # type: ignore[arg-type]
        found = known_widths(encoder, None)
        assert (found.token_width, found.pooled_width) == as_loaded(encoder), family
        assert found.source == "weights"


def test_a_fitted_clip_has_the_widths_that_fitting_gives() -> None:
    """Its width is the recipe's, the width of its vectors the library's."""
    for family in ("open_clip_text", "open_clip_image"):
        encoder = Encoder(family=family, weights="fitted")  # type: ignore[arg-type]
        found = known_widths(encoder, ClipFit(width=96))
        token_width = 96 if family == "open_clip_text" else 0
        assert (found.token_width, found.pooled_width) == (token_width, 64)
        assert found.source == "recipe"


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("google/t5-v1_1-xxl", 4096),
        ("google/t5-v1_1-xl", 2048),
        ("google/flan-t5-large", 1024),
        ("google-t5/t5-11b", 1024),
        ("t5-small", 512),
        ("google/mt5-base@0123abc", 768),
    ],
)
def test_t5_is_known_by_its_name(name: str, width: int) -> None:
    """The widths that their configurations on the hub have, also where a commit is pinned."""
    found = known_widths(Encoder(family="transformers", weights=name), None)
    assert found == StreamWidths(token_width=width, source="name")


def test_clip_is_known_by_its_architecture() -> None:
    """The paper's CLIP ViT-L/14 has states and vectors of 768."""
    weights = {"model": "ViT-L-14", "weights": "openai"}
    text = known_widths(Encoder(family="open_clip_text", **weights), None)
    image = known_widths(Encoder(family="open_clip_image", **weights), None)
    assert text == StreamWidths(token_width=768, pooled_width=768, source="name")
    assert image == StreamWidths(pooled_width=768, source="name")


@pytest.mark.parametrize(
    ("family", "weights"),
    [
        ("transformers", "someone/model"),
        ("transformers", "someone/t5-huge"),
        ("open_clip_text", "hf-hub:someone/clip"),
    ],
)
def test_what_is_not_known_is_not_guessed(family: str, weights: str) -> None:
    """Names on the hub that say nothing, and were never downloaded."""
    encoder = Encoder(family=family, weights=weights)  # type: ignore[arg-type]
    assert not known_widths(encoder, None).is_known


def test_a_model_in_the_hubs_cache_is_read_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own configuration goes before what the name says."""
    repository = tmp_path / "models--google--t5-v1_1-xxl"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"d_model": 12}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = known_widths(Encoder(family="transformers", weights="google/t5-v1_1-xxl"), None)
    assert found == StreamWidths(token_width=12, source="weights")


def test_a_finished_cache_goes_before_everything(tmp_path: Path) -> None:
    """Of this recipe's own stage, or of one made elsewhere that the recipe names."""
    facts = {"token_width": 5, "pooled_width": 0}
    cache = manifest(tmp_path / "embed" / "t5" / "f", receipt("null", facts=facts))
    expected = StreamWidths(token_width=5, source="cache")
    assert stream_widths(load_recipe("demo"), {"embed/t5": cache})["t5"] == expected
    elsewhere = load_recipe("demo", [f"encoders.t5.cache={cache.directory}"])
    widths = stream_widths(elsewhere, {})
    assert widths["t5"] == expected
    assert list(widths) == list(elsewhere.encoders)
    assert widths["clip_text"].source == "recipe"
