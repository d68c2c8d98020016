"""The recipe's sections on the model: noise levels and networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, PositiveInt, SerializerFunctionWrapHandler, model_serializer

from ediffi.noise import SigmaDistribution
from pipelines.recipe_sections.data import Finite, Positive, Section

if TYPE_CHECKING:
    from ediffi.conditioning import StreamConfig
    from ediffi.unet import UNetConfig


class Noise(Section):
    """ln sigma ~ N(log_mean, log_std^2); `sigma_data` is the standard deviation of the data."""

    log_mean: Finite = -1.2
    log_std: Positive = 1.2
    sigma_data: Positive = 0.5

    @property
    def distribution(self) -> SigmaDistribution:
        return SigmaDistribution(log_mean=self.log_mean, log_std=self.log_std)


class Network(Section):
    """Size of the U-Net. Resolutions count pixels of the feature map, after pixel-unshuffle."""

    image_px: Annotated[int, Field(ge=0)] = 0  # side of its pictures; 0: data.image_px
    patch_px: PositiveInt = 1
    widths: tuple[PositiveInt, ...]
    num_blocks: PositiveInt = 3
    self_attention_px: tuple[PositiveInt, ...] = ()
    cross_attention_px: tuple[PositiveInt, ...] = ()
    head_width: PositiveInt = 64
    context_width: PositiveInt
    embedding_width: PositiveInt

    @model_serializer(mode="wrap")
    def _without_default(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # `image_px` came later: networks that do not name it keep their fingerprints
        fields: dict[str, Any] = serialize(self)
        return fields if self.image_px else {k: v for k, v in fields.items() if k != "image_px"}

    def config(self, image_px: int, streams: tuple[StreamConfig, ...]) -> UNetConfig:
        """The model library's own description, for pictures of that size and those streams."""
        from ediffi.unet import UNetConfig

        sizes = {name: value for name, value in self.model_dump().items() if name != "image_px"}
        return UNetConfig(image_px=image_px, streams=streams, **sizes)
