"""The recipe's section on super-resolution: models that enlarge what the base draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import ConfigDict, Field, PositiveInt, model_validator

from ediffi.degradation import DegradationConfig, DegradationPass
from ediffi.noise import SigmaDistribution
from ediffi.train.config import TrainConfig
from pipelines.recipe_sections.data import Section
from pipelines.recipe_sections.training import Experts, Interval, NamedSplit

if TYPE_CHECKING:
    from ediffi.conditioning import StreamConfig
    from ediffi.efficient_unet import EfficientUNetConfig

# A misspelt field must be an error in the model library's own dataclasses too.
DegradationConfig.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
DegradationPass.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]


class EfficientNetwork(Section):
    """Size of an Efficient U-Net. Level 0 works at half the picture's resolution."""

    widths: tuple[PositiveInt, ...] = Field(min_length=1)
    num_blocks: tuple[PositiveInt, ...]
    self_attention_px: tuple[PositiveInt, ...] = ()
    cross_attention_px: tuple[PositiveInt, ...] = ()
    head_width: PositiveInt = 64
    context_width: PositiveInt
    embedding_width: PositiveInt
    enlarging: Literal["bilinear", "bicubic"] = "bicubic"  # of the low-resolution input

    @model_validator(mode="after")
    def _one_number_a_level(self) -> Self:
        if len(self.num_blocks) != len(self.widths):
            raise ValueError(
                f"num_blocks must be one number for each of the {len(self.widths)} widths, "
                f"got {len(self.num_blocks)}"
            )
        return self


class SuperResolutionExperts(Experts):
    """Experts of one super-resolution model; by default two halves, as of the paper's SR256."""

    split: NamedSplit | tuple[Interval, ...] = "halves"


class SuperResolution(Section):
    """One model that enlarges pictures from `low_res_px` to `image_px`."""

    image_px: PositiveInt  # side at which pictures are read; ingest must store as much
    low_res_px: PositiveInt
    patch_px: Annotated[int, Field(ge=0)] = 0  # trained on random squares; 0: whole pictures
    network: EfficientNetwork
    degradation: DegradationConfig = DegradationConfig()
    train: TrainConfig
    experts: SuperResolutionExperts | None = None  # null: the model serves all noise by itself

    def expert_configs(self, name: str, distribution: SigmaDistribution) -> list[TrainConfig]:
        """Settings of every run of every expert; none without experts.

        Args:
            name: of this model in the recipe, for the message.

        Raises:
            ValueError: the experts do not tile the axis, or one is to carry on an average that
                its parent does not have.
        """
        if self.experts is None:
            return []
        try:
            self.experts.check_parents(self.train, distribution, first_name=name)
            return list(self.experts.configs(distribution).values())
        except ValueError as error:
            raise ValueError(f"super_resolution.{name}: {error}") from error

    @property
    def factor(self) -> int:
        """Times the low-resolution side."""
        return self.image_px // self.low_res_px

    @property
    def network_px(self) -> int:
        """Side of what the network sees while it is trained."""
        return self.patch_px or self.image_px

    def network_config(self, streams: tuple[StreamConfig, ...]) -> EfficientUNetConfig:
        """The model library's own description, for those streams."""
        from ediffi.efficient_unet import EfficientUNetConfig

        return EfficientUNetConfig(
            image_px=self.network_px,
            low_res_factor=self.factor,
            streams=streams,
            **self.network.model_dump(),
        )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.image_px % self.low_res_px or self.factor < 2:
            raise ValueError(
                f"image_px must be two or more times low_res_px, got {self.image_px} and "
                f"{self.low_res_px}"
            )
        if self.patch_px > self.image_px:
            raise ValueError(
                f"patch_px must be at most image_px ({self.image_px}), got {self.patch_px}"
            )
        stride = 2 ** len(self.network.widths)
        for required in (self.factor, stride):
            if self.network_px % required:
                field = "patch_px" if self.patch_px else "image_px"
                raise ValueError(
                    f"{field} must be divisible by {self.factor} (image_px / low_res_px) and "
                    f"{stride} (2^levels of the network), got {self.network_px}"
                )
        self._check_attention()
        return self

    def _check_attention(self) -> None:
        levels_px = [self.network_px // 2 ** (i + 1) for i in range(len(self.network.widths))]
        for field in ("self_attention_px", "cross_attention_px"):
            if unknown := [px for px in getattr(self.network, field) if px not in levels_px]:
                raise ValueError(
                    f"network.{field} must be resolutions of the network's levels, "
                    f"{', '.join(map(str, levels_px))}; got {', '.join(map(str, unknown))}"
                )
        if self.network.self_attention_px and self.network_px < self.image_px:
            raise ValueError(
                "network.self_attention_px must be empty for training on patches, got "
                f"{', '.join(map(str, self.network.self_attention_px))}: with self-attention a "
                f"network trained on {self.patch_px} px is not fit for {self.image_px} px"
            )


def by_size(models: Mapping[str, SuperResolution]) -> dict[str, SuperResolution]:
    """Models in the order in which they enlarge, the first to follow the base first."""
    return dict(sorted(models.items(), key=lambda item: item[1].image_px))


def check_cascade(models: Mapping[str, SuperResolution], base_px: int) -> None:
    """Check that each model enlarges what the one before it draws, the first what the base draws.

    Raises:
        ValueError: naming the field, the size it must have and the one it has.
    """
    drawer, drawn_px = "the base", base_px
    for name, model in by_size(models).items():
        if model.low_res_px != drawn_px:
            raise ValueError(
                f"super_resolution.{name}.low_res_px must be {drawn_px}, the size of what {drawer} "
                f"draws, got {model.low_res_px}: models enlarge in order of their image_px"
            )
        drawer, drawn_px = name, model.image_px
