"""Tests of pipelines.stages.alignment: both judges tell right captions from wrong ones."""

import numpy as np
import pytest
import torch

from ediffi import encoders, features
from ediffi.encoding.encoder_weights import EncoderConfig
from pipelines.demo.shapes import combinations_of, draw
from pipelines.stages.alignment import AlignmentScores, clip_alignment, shapes_alignment


def test_shapes_judge_reads_the_pictures_of_the_data_set() -> None:
    """Real pictures match their own captions and, every one, fail under another's."""
    combinations = combinations_of("train")[:6]
    rng = np.random.default_rng(0)
    drawn = [draw(one, image_px=32, rng=rng) for one in combinations]
    pictures = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)
    captions = [one.caption for one in combinations]
    align = shapes_alignment()
    right = align(pictures, captions)
    assert list(right.scores) == [1.0] * 6
    assert (right.details["colour"], right.details["shape"], right.details["position"]) == (1, 1, 1)
    assert list(align(pictures, [*captions[1:], captions[0]]).scores) == [0.0] * 6


def test_clip_judge_is_the_cosine_and_knows_its_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred times the cosine; chance is the mean score under the next picture's caption."""
    vectors = {"east": torch.tensor([1.0, 0.0]), "north": torch.tensor([0.0, 2.0])}

    class TextEncoder:
        def encode(self, captions: list[str]) -> list[dict[str, torch.Tensor]]:
            return [{"pooled": vectors[caption]} for caption in captions]

    class Pictures:
        def __init__(self, config: EncoderConfig, *, device: str) -> None:
            assert config.family == "open_clip_image"

        def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[3.0, 0.0], [1.0, 1.0]])

    monkeypatch.setattr(encoders, "load_encoder", lambda config, device: TextEncoder())
    monkeypatch.setattr(features, "ClipFeatures", Pictures)
    align = clip_alignment(
        EncoderConfig(family="open_clip_text", weights="w"),
        EncoderConfig(family="open_clip_image", weights="w"),
        "cpu",
    )
    found = align(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), ["east", "north"])
    diagonal = 100 / 2**0.5
    assert found.scores == pytest.approx([100, diagonal])
    assert found.details["chance"] == pytest.approx((0 + diagonal) / 2)


def test_the_summary_brackets_the_mean() -> None:
    """The interval holds the mean, repeats for a seed, and carries the details along."""
    scores = AlignmentScores(scores=[0.0, 1.0, 1.0, 1.0], details={"chance": 0.1})
    summary = scores.to_json(seed=3)
    assert summary["score"] == 0.75
    assert summary["low"] < 0.75 < summary["high"]
    assert summary["chance"] == 0.1
    assert scores.to_json(seed=3) == summary
