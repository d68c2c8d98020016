"""Tests of ediffi.prompts: encoders do the work that is needed, and no more."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ediffi.encoders import Encoder, load_encoder
from ediffi.ensemble_file import read_ensemble_info
from ediffi.prompts import PromptEncoders, one_each
from tests.tiny_generator import write_generator

PROMPTS = ["a red circle", "a blue square", "a red circle"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble that hears T5 and pictures."""
    path = tmp_path_factory.mktemp("prompts") / "ensemble"
    return write_generator(path, streams=("t5", "clip_image"))


def encoders_of(directory: Path) -> PromptEncoders:
    """Its encoders, none of them loaded yet."""
    return PromptEncoders(directory, read_ensemble_info(directory), "cpu")


def test_what_stands_twice_is_encoded_once(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four seeds of a prompt cost one pass of T5-XXL, and one reference for all is read once."""
    batches: list[int] = []

    def recorded(config: Any, *, device: str) -> Encoder:
        encoder = load_encoder(config, device=device)
        encode = encoder.encode

        def counting(batch: Sequence[Any]) -> list[dict[str, torch.Tensor]]:
            batches.append(len(batch))
            return encode(batch)

        monkeypatch.setattr(encoder, "encode", counting)
        return encoder

    monkeypatch.setattr("ediffi.prompts.load_encoder", recorded)
    picture = Image.new("RGB", (8, 8), "red")
    found = encoders_of(directory).conditioning(PROMPTS, [picture] * 3, [None] * 3)
    assert batches == [2, 1]
    tokens_BTD = found.streams["t5"].tokens_BTD
    assert tokens_BTD is not None
    assert torch.equal(tokens_BTD[0], tokens_BTD[2])
    assert not torch.equal(tokens_BTD[0], tokens_BTD[1])


def test_image_encoders_are_loaded_for_references_alone(directory: Path, tmp_path: Path) -> None:
    """Without the CLIP's weights prompts are encoded all the same; a reference then fails."""
    copy = tmp_path / "ensemble"
    shutil.copytree(directory, copy)
    shutil.rmtree(copy / "encoders" / "clip")
    encoders = encoders_of(copy)
    assert encoders.conditioning(PROMPTS, [None] * 3, [None] * 3).batch_size == 3
    with pytest.raises(ValueError, match="clip"):
        encoders.conditioning(PROMPTS, [Image.new("RGB", (8, 8))] * 3, [None] * 3)


def test_one_for_all_or_one_for_each() -> None:
    """A text is one thing, not a sequence of letters; other lengths are refused."""
    assert one_each("style", "abc", 2) == ["abc", "abc"]
    assert one_each("style", None, 2) == [None, None]
    assert one_each("style", ["a", None], 2) == ["a", None]
    with pytest.raises(ValueError, match=r"style must be one for all or one a prompt \(2\), got 3"):
        one_each("style", ["a", "b", "c"], 2)
