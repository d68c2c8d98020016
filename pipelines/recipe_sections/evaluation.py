"""The recipe's section on evaluation: what is measured, and with which features."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from pipelines.colours import colour_in
from pipelines.recipe_sections.data import Fraction, Name, NonNegative, Positive, Section

Model = Literal["base", "ensemble"]

# -- features -----------------------------------------------------------------------------------


class ClipFeatures(Section):
    """Pictures as the vectors of one of the recipe's own CLIP image encoders."""

    kind: Literal["clip"]
    encoder: Name = "clip_image"


class OpenClipFeatures(Section):
    """Pictures as the vectors of any CLIP that open_clip can load."""

    kind: Literal["open_clip"]
    model: str = ""  # "": where weights is a directory
    weights: str


class TimmFeatures(Section):
    """Pictures as the pooled features of a timm model."""

    kind: Literal["timm"]
    model: str
    weights: str


class InceptionFeatures(Section):
    """Pictures as the features of FID's Inception-v3, whose weights lie in a file."""

    kind: Literal["inception"]
    weights: str


Features = Annotated[
    ClipFeatures | OpenClipFeatures | TimmFeatures | InceptionFeatures, Field(discriminator="kind")
]

# -- measurements that are made if their section is there ---------------------------------------


def _ascending(name: str, values: tuple[float, ...]) -> tuple[float, ...]:
    if any(low >= high for low, high in pairwise(values)):
        raise ValueError(f"{name} must ascend, got {list(values)}")
    return values


class GuidanceCurve(Section):
    """Fréchet distance against alignment, by guidance scale (the paper's figure of trade-offs)."""

    scales: tuple[NonNegative, ...] = Field(min_length=2)
    num_pictures: Annotated[int, Field(ge=2)] = 256
    models: tuple[Model, ...] = Field(default=("base", "ensemble"), min_length=1)

    @field_validator("scales")
    @classmethod
    def _in_order(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return _ascending("scales", value)


class TextAblation(Section):
    """Drawing with one text encoder alone, the others dropped as in training, and with all."""

    num_pictures: Annotated[int, Field(ge=2)] = 256


class AttentionByNoise(Section):
    """How much of cross-attention goes to which stream, by noise level."""

    sigmas: tuple[Positive, ...] = Field(
        default=(0.01, 0.05, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 80.0), min_length=2
    )
    num_samples: PositiveInt = 64

    @field_validator("sigmas")
    @classmethod
    def _in_order(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return _ascending("sigmas", value)


class PaintedPhrase(Section):
    """A phrase of the prompt and the box it is painted into."""

    phrase: str
    box: tuple[Fraction, Fraction, Fraction, Fraction]  # left, top, right, bottom
    strength: NonNegative = 0.4

    @model_validator(mode="after")
    def _has_area(self) -> Self:
        left, top, right, bottom = self.box
        if left >= right or top >= bottom:
            raise ValueError(f"box must be [left, top, right, bottom], got {list(self.box)}")
        return self


class PaintedCase(Section):
    """One prompt with its painted phrases."""

    prompt: str
    phrases: tuple[PaintedPhrase, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _of_the_prompt(self) -> Self:
        for one in self.phrases:
            if one.phrase.lower() not in self.prompt.lower():
                raise ValueError(f"phrase {one.phrase!r} must be part of the prompt")
        return self


class PaintingCases(Section):
    """Where painted phrases come to lie, against the same drawings without a painting."""

    detector: Literal["colour"] = "colour"
    cases: tuple[PaintedCase, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(default=tuple(range(16)), min_length=1)

    @model_validator(mode="after")
    def _can_be_seen(self) -> Self:
        for case in self.cases:
            colours = [colour_in(one.phrase) for one in case.phrases]
            if len(set(colours)) < len(colours):
                raise ValueError(
                    f"detector 'colour' tells phrases by their colours, which must differ in "
                    f"{case.prompt!r}"
                )
        return self


class StyleTransfer(Section):
    """Whether drawings have the style of the picture that they are given as reference."""

    column: str = Field(min_length=1)  # of the samples' JSON
    caption_column: str = ""  # of their JSON, with prompts that name no style; "": the captions
    num_pictures: Annotated[int, Field(ge=2)] = 256
    max_train_pictures: PositiveInt = 4096  # that the classifier of styles learns from


# -- the section --------------------------------------------------------------------------------


class Evaluation(Section):
    """Loss per noise level on held-out samples, Fréchet distance and text alignment."""

    num_bins: PositiveInt = 8
    draws_per_bin: Annotated[int, Field(ge=2)] = 512
    batch_images: PositiveInt = 128
    features: Features
    alignment: Literal["clip", "shapes"] = "clip"
    text_encoder: Name = "clip_text"  # for the CLIP score
    num_resamples: Annotated[int, Field(ge=10)] = 200  # behind the interval of a distance
    guidance_curve: GuidanceCurve | None = None
    text_ablation: TextAblation | None = None
    attention: AttentionByNoise | None = None
    painting: PaintingCases | None = None
    style: StyleTransfer | None = None
