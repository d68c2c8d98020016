"""The recipe: what a run makes, as one model that is checked whole before anything starts.

Unknown fields are errors. What things take is said in `resources`, which enters no fingerprint.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveInt, ValidationInfo, field_validator, model_validator

from pipelines.recipe_sections.custom import CustomStage, check_names
from pipelines.recipe_sections.data import (
    Data,
    Fraction,
    HeldOut,
    Name,
    PictureFolder,
    Pictures,
    Positive,
    ReadyShards,
    Section,
    UrlList,
)
from pipelines.recipe_sections.evaluation import ClipFeatures, Evaluation
from pipelines.recipe_sections.model import Network, Noise
from pipelines.recipe_sections.resources import Resources
from pipelines.recipe_sections.sampling import Sampling
from pipelines.recipe_sections.super_resolution import SuperResolution, check_cascade
from pipelines.recipe_sections.training import Experts, Interval, TrainConfig

__all__ = [
    "HeldOut",
    "Interval",
    "PictureFolder",
    "Pictures",
    "ReadyShards",
    "Recipe",
    "Resources",
    "UrlList",
]

# -- encoders and conditioning ------------------------------------------------------------------


class Encoder(Section):
    """One encoder: its embeddings are cached as a stream and condition the network.

    `weights` is a hub name, an open_clip tag, a local directory, `package:MODULE` for weights
    that come inside an installed package, or `fitted` for the CLIP that `clip_fit` makes.
    `cache` names the finished folder of an embed stage made elsewhere, to be used as it is.
    """

    family: Literal["transformers", "open_clip_text", "open_clip_image"]
    weights: str
    model: str = ""
    max_tokens: PositiveInt = 77
    too_long: Literal["truncate", "reject"] = "truncate"  # captions beyond max_tokens
    layer: Literal["last", "penultimate"] = "last"
    pad: Literal["drop", "keep"] = "drop"
    compute_dtype: Literal["fp32", "bf16"] = "fp32"
    storage_dtype: Literal["fp32", "bf16", "int8"] = "bf16"
    cache: str = ""  # a path or a URL
    max_rejects_fraction: Fraction = 0.0
    dropout: Fraction = 0.1  # probability that a training sample goes without this stream

    @property
    def is_fitted(self) -> bool:
        return self.weights == "fitted"

    @property
    def is_image(self) -> bool:
        """Whether it encodes pictures, and not captions."""
        return self.family == "open_clip_image"


class ClipFit(Section):
    """Fit a small CLIP on the recipe's own pictures: for demos and private domains."""

    image_px: PositiveInt = 32
    num_steps: PositiveInt = 300
    batch_images: PositiveInt = 128
    width: PositiveInt = 64
    lr: Positive = 2e-3


# -- stages -------------------------------------------------------------------------------------

STAGES = (
    *("ingest", "clip_fit", "embed", "base", "experts"),
    *("super_resolution", "super_resolution_experts"),
    *("assemble", "sample", "evaluate", "report"),
)


class CacheRecipe(Section):
    """Data and encoders: all that embedding caches need."""

    name: Name
    seed: int = 0
    data: Data
    clip_fit: ClipFit | None = None
    encoders: dict[Name, Encoder] = Field(min_length=1)
    custom_stages: dict[Name, CustomStage] = Field(default_factory=dict)
    resources: dict[str, Resources] = Field(default_factory=dict)

    @field_validator("custom_stages")
    @classmethod
    def _free_names(cls, value: dict[str, CustomStage]) -> dict[str, CustomStage]:
        check_names(value, STAGES)
        return value

    @field_validator("resources")
    @classmethod
    def _known_stages(
        cls, value: dict[str, Resources], info: ValidationInfo
    ) -> dict[str, Resources]:
        known = (*STAGES, *info.data.get("custom_stages", ()))
        for name in value:
            if name not in known:
                raise ValueError(f"no stage {name!r}; stages: {', '.join(known)}")
        return value

    @model_validator(mode="after")
    def _fitted_weights_are_made(self) -> Self:
        for name, encoder in self.encoders.items():
            if encoder.is_fitted and self.clip_fit is None and not encoder.cache:
                raise ValueError(
                    f"encoders.{name}.weights is 'fitted', which needs a `clip_fit:` section"
                )
        return self

    def resources_of(self, stage: str) -> Resources:
        """Resources of a stage by its name; `embed/t5` takes those of `embed`, and so on."""
        return self.resources.get(stage.split("/")[0], Resources())


class Recipe(CacheRecipe):
    """The whole recipe."""

    missing_embeddings: Literal["error", "skip", "null"] = "error"
    noise: Noise = Noise()
    network: Network
    base: TrainConfig
    experts: Experts
    sample: Sampling
    evaluate: Evaluation
    super_resolution: dict[Name, SuperResolution] = Field(default_factory=dict)

    @property
    def base_px(self) -> int:
        """Side of the pictures that the base and its experts see."""
        return self.network.image_px or self.data.image_px

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.experts.check_parents(self.base, self.noise.distribution)
        if isinstance(self.data, ReadyShards) and not self.data.held_out:
            raise ValueError(
                "data.held_out: a recipe that evaluates needs held-out shards; name their tars"
            )
        self._check_evaluation()
        self._check_sizes()
        check_cascade(self.super_resolution, self.base_px)
        for stage, config in (
            ("base", self.base),
            *(("experts", one) for one in self.experts.configs(self.noise.distribution).values()),
            *(("super_resolution", one.train) for one in self.super_resolution.values()),
            *(
                ("super_resolution_experts", config)
                for name, one in self.super_resolution.items()
                for config in one.expert_configs(name, self.noise.distribution)
            ),
        ):
            config.micro_batch(self.resources_of(stage).num_workers)
        return self

    def _check_sizes(self) -> None:
        """What ingest makes smaller cannot be trained on at a larger size."""
        if isinstance(self.data, ReadyShards):
            return  # they are stored as they came
        wanted = {"network.image_px": self.base_px}
        for name, one in self.super_resolution.items():
            wanted[f"super_resolution.{name}.image_px"] = one.image_px
        for field, image_px in wanted.items():
            if image_px > self.data.image_px:
                raise ValueError(
                    f"{field}: must be at most data.image_px, the size at which pictures are "
                    f"stored ({self.data.image_px}), got {image_px}. Raise data.image_px, and "
                    "keep the base's size with network.image_px"
                )

    def _check_evaluation(self) -> None:
        wanted = {}
        if isinstance(self.evaluate.features, ClipFeatures):
            wanted["evaluate.features.encoder"] = (
                self.evaluate.features.encoder,
                "open_clip_image",
            )
        if self.evaluate.alignment == "clip":
            wanted["evaluate.text_encoder"] = (self.evaluate.text_encoder, "open_clip_text")
        for field, (name, family) in wanted.items():
            fitting = [key for key, encoder in self.encoders.items() if encoder.family == family]
            if name not in fitting:
                raise ValueError(
                    f"{field}: must name an encoder of family {family}, got {name!r}; "
                    f"the recipe has: {', '.join(fitting) or 'none'}"
                )
        if self.evaluate.alignment == "clip":
            self._check_clip_pair(self.encoders[self.evaluate.text_encoder])
        self._check_streams()

    def _check_streams(self) -> None:
        """Some measurements need several text streams, or one of pictures."""
        images = [one for one in self.encoders.values() if one.is_image]
        if self.evaluate.text_ablation is not None and len(self.encoders) - len(images) < 2:
            raise ValueError(
                "evaluate.text_ablation: compares text encoders, of which the recipe must have two "
                f"at least, got {len(self.encoders) - len(images)}"
            )
        if self.evaluate.style is not None and not images:
            raise ValueError(
                "evaluate.style: needs an encoder of family open_clip_image, the recipe has none"
            )

    def _check_clip_pair(self, text: Encoder) -> None:
        """The CLIP score needs the image half of the same CLIP."""
        images = [one for one in self.encoders.values() if one.is_image]
        if (text.weights, text.model) not in [(one.weights, one.model) for one in images]:
            raise ValueError(
                f"evaluate.alignment: 'clip' needs an encoder of family open_clip_image with the "
                f"weights of {self.evaluate.text_encoder!r} ({text.weights!r}, {text.model!r})"
            )
