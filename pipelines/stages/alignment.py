"""Does a picture show what its caption says? Two judges with one signature.

`shapes` reads colour, shape and position back from the pixels of the embedded data set and is
exact; `clip` is the field's cosine between CLIP's image and text vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipelines.stage import Json

if TYPE_CHECKING:
    from torch import Tensor

    from ediffi.encoding.encoder_weights import EncoderConfig


@dataclass(frozen=True, kw_only=True)
class AlignmentScores:
    """One score a picture, and figures that explain them."""

    scores: Sequence[float]
    details: Mapping[str, float] = field(default_factory=dict)

    def to_json(self, seed: int) -> Json:
        """The mean score with its 95 % bootstrap interval, and the details."""
        from ediffi.metrics import bootstrap_interval

        low, high = bootstrap_interval(self.scores, seed=seed)
        score = sum(self.scores) / len(self.scores)
        return {"score": score, "low": low, "high": high, **self.details}


# Maps pictures, uint8 (B, 3, H, W), and their captions to scores.
Alignment = Callable[["Tensor", Sequence[str]], AlignmentScores]


def shapes_alignment() -> Alignment:
    """Score 1 if colour, shape and position are all right, else 0."""
    from pipelines.demo.detector import score_alignment

    def align(pictures: Tensor, captions: Sequence[str]) -> AlignmentScores:
        report = score_alignment(pictures.numpy(), captions)
        details = {
            "colour": report.colour_fraction,
            "shape": report.shape_fraction,
            "position": report.position_fraction,
            "chance": report.chance_fraction,
        }
        return AlignmentScores(scores=[float(right) for right in report.all_right], details=details)

    return align


def clip_alignment(text: EncoderConfig, image: EncoderConfig, device: str) -> Alignment:
    """CLIP score: 100 times the cosine. `chance` is the score under captions shifted by one."""
    import torch

    from ediffi.encoders import load_encoder
    from ediffi.features import ClipFeatures
    from ediffi.metrics import clip_score, clip_scores

    extract = ClipFeatures(image, device=device)
    text_encoder = load_encoder(text, device=device)

    def align(pictures: Tensor, captions: Sequence[str]) -> AlignmentScores:
        encoded = text_encoder.encode(list(captions))
        texts = torch.stack([tensors["pooled"] for tensors in encoded]).double().numpy()
        images = extract(pictures).double().numpy()
        shifted = [*texts[1:], texts[0]]
        scores = [float(score) for score in clip_scores(images, texts)]
        return AlignmentScores(scores=scores, details={"chance": clip_score(images, shifted)})

    return align
