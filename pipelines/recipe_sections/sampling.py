"""The recipe's section on sampling: what is drawn, and how."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, PlainSerializer, PositiveInt, field_validator, model_validator

from pipelines.recipe_sections.data import Fraction, NonNegative, Positive, Section

if TYPE_CHECKING:
    from ediffi.sampling import SamplingConfig

# JSON has no infinity: it is written as the string "inf", which reads back as the number.
Sigma = Annotated[
    float,
    Field(ge=0, allow_inf_nan=True),
    PlainSerializer(lambda sigma: "inf" if math.isinf(sigma) else sigma, when_used="json"),
]
Colour = Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")]


class SamplerSettings(Section):
    """How noise becomes a picture: the fields of the library's `SamplingConfig`."""

    sampler: Literal["heun", "dpm++2m", "deis"] = "heun"
    num_steps: PositiveInt = 18
    guidance: NonNegative = 2.0
    guidance_interval: tuple[Sigma, Sigma] = (0.0, math.inf)
    guidance_rescale: Fraction = 0.0
    dynamic_threshold: Fraction = 0.0
    churn: NonNegative = 0.0
    churn_sigma_min: Sigma = 0.0
    churn_sigma_max: Sigma = math.inf
    churn_noise: Positive = 1.0
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    rho: Positive = 7.0
    batch_pictures: PositiveInt = 64

    def config(self) -> SamplingConfig:
        """The model library's own description of how to sample."""
        from ediffi.sampling import SamplingConfig

        names = SamplingConfig.__dataclass_fields__
        return SamplingConfig(**{name: getattr(self, name) for name in names})

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"sigma_min must be below sigma_max, got {self.sigma_min} and {self.sigma_max}"
            )
        if self.churn_sigma_min > self.churn_sigma_max:
            raise ValueError(
                "churn_sigma_min must be at most churn_sigma_max, got "
                f"{self.churn_sigma_min} and {self.churn_sigma_max}"
            )
        if self.guidance_interval[0] >= self.guidance_interval[1]:
            raise ValueError(
                "guidance_interval must be two rising noise levels, got "
                f"{list(self.guidance_interval)}"
            )
        return self

    @model_validator(mode="after")
    def _churn_is_of_heun(self) -> Self:
        if self.churn and self.sampler != "heun":
            raise ValueError(
                f"churn must be 0 with sampler {self.sampler!r}, got {self.churn}: only 'heun' "
                "adds noise on the way"
            )
        return self


class Enlarging(SamplerSettings):
    """How the super-resolution models draw; the paper's ten steps of DEIS unless it says else."""

    sampler: Literal["heun", "dpm++2m", "deis"] = "deis"
    num_steps: PositiveInt = 10
    rho: Positive = 3.0


class StyleExample(Section):
    """A prompt to draw in the style of a picture."""

    prompt: str = Field(min_length=1)
    reference: str = Field(min_length=1)  # path of a picture


class PaintingExample(Section):
    """A prompt to draw where a painting says."""

    prompt: str = Field(min_length=1)
    painting: str = Field(min_length=1)  # a PNG whose colours name phrases, or a folder of masks
    phrases: dict[Colour, str] = Field(default_factory=dict)  # colour -> phrase; empty: a folder
    strengths: dict[Colour, NonNegative] = Field(default_factory=dict)  # by the same colours


class Sampling(SamplerSettings):
    """Pictures to make: grids for the prompts, and a set for the held-out captions."""

    prompts: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field((0, 1, 2, 3), min_length=1)
    num_held_out_captions: PositiveInt = 256
    pictures_per_caption: PositiveInt = 1
    styles: tuple[StyleExample, ...] = ()
    paintings: tuple[PaintingExample, ...] = ()
    enlarging: Enlarging = Enlarging()
    image_px: Annotated[int, Field(ge=0)] = 0  # how far up the cascade; 0: all the way

    @field_validator("seeds")
    @classmethod
    def _noise_has_a_seed(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if min(seeds) < 0:
            raise ValueError(f"seeds must not be negative, got {min(seeds)}")
        return seeds
