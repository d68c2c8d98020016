"""The network F of eDiff-I's base model: an ADM U-Net with cross-attention (paper section 4).

Each level has `num_blocks` residual blocks on the way down and one more on the way up, joined by
skip connections; self-attention, then cross-attention, follow the blocks at chosen resolutions.
The picture may be folded into channels (pixel-unshuffle) so that small machines can train it.

Shapes: B batch, C channels, H W picture or feature map, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ediffi.attention import Context
from ediffi.conditioning import Conditioning, StreamConfig
from ediffi.layers import (
    CrossAttention,
    ResidualBlock,
    SelfAttention,
    StreamProjections,
    apply,
    embed,
    group_norm,
    noise_mlp,
)
from ediffi.network_config import (
    check_attention,
    check_positive,
    check_streams,
    check_widths,
    config_to_json,
    config_values,
)


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Sizes of a U-Net.

    The paper's base has 64 px, widths 256, 512, 1024, 1024, 3 blocks and both attentions at 32,
    16 and 8 px.
    """

    image_px: int  # side of the square picture
    image_channels: int = 3
    patch_px: int = 1  # pixel-unshuffle factor: the feature map has image_px / patch_px pixels
    widths: tuple[int, ...]  # channels per level; each next level halves the resolution
    num_blocks: int = 3  # residual blocks per level
    self_attention_px: tuple[int, ...] = ()  # feature-map resolutions with self-attention
    cross_attention_px: tuple[int, ...] = ()  # feature-map resolutions with cross-attention
    head_width: int = 64  # channels per attention head; must divide every width with attention
    context_width: int = 256  # width of cross-attention tokens after projection
    embedding_width: int = 256  # width of the noise embedding
    streams: tuple[StreamConfig, ...] = ()

    def __post_init__(self) -> None:
        """Check every field; ValueError names it, what was required and found."""
        check_positive(self, ("image_px", "image_channels", "patch_px", "num_blocks"))
        check_positive(self, ("head_width", "context_width", "embedding_width"))
        check_widths(self.widths)
        factor = self.patch_px * 2 ** (len(self.widths) - 1)
        if self.image_px % factor:
            raise ValueError(
                f"image_px must be divisible by patch_px * 2^(levels - 1) = {factor}, "
                f"got {self.image_px}; use fewer widths or a smaller patch_px"
            )
        check_attention(self)
        check_streams(self)

    @property
    def level_px(self) -> tuple[int, ...]:
        """Feature-map resolution of each level, finest first."""
        return tuple(
            self.image_px // self.patch_px // 2**level for level in range(len(self.widths))
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return config_to_json(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> UNetConfig:
        """Read what `to_json` wrote; ValueError on an unknown field."""
        return cls(**config_values(cls, data))


class Block(nn.Module):
    """One residual block, then self-attention and cross-attention where `px` calls for them."""

    def __init__(self, config: UNetConfig, px: int, in_width: int, out_width: int) -> None:
        super().__init__()
        self.residual = ResidualBlock(in_width, out_width, config.embedding_width)
        self.self_attention: SelfAttention | None = None
        self.cross_attention: CrossAttention | None = None
        if px in config.self_attention_px:
            self.self_attention = SelfAttention(out_width, config.head_width)
        if px in config.cross_attention_px:
            self.cross_attention = CrossAttention(
                out_width, config.head_width, config.context_width
            )

    def forward(self, x_BCHW: Tensor, embedding_BD: Tensor, context: Context | None) -> Tensor:
        """Map (B, in_width, H, W) to (B, out_width, H, W)."""
        x_BCHW = self.residual(x_BCHW, embedding_BD)
        if self.self_attention is not None:
            x_BCHW = self.self_attention(x_BCHW)
        if self.cross_attention is not None:
            assert context is not None
            x_BCHW = self.cross_attention(x_BCHW, context)
        return x_BCHW


class UNet(nn.Module):
    """Map a scaled noisy picture, its noise level and conditioning to F (paper section 1).

    The last convolution starts at zero, so that F = 0 at initialisation. Residual branches do not,
    unlike in ADM: zeroing them slowed a short training of a small network.

    Attributes:
        gradient_checkpointing: compute the activations of blocks again backwards, not keep them.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        widths = config.widths
        patch_channels = config.image_channels * config.patch_px**2
        self.noise_embedding = noise_mlp(widths[0], config.embedding_width)
        self.streams = StreamProjections(
            config.streams, config.context_width, config.embedding_width
        )
        self.conv_in = nn.Conv2d(patch_channels, widths[0], 3, padding=1)
        self.encoder, skip_widths = self._build_encoder()
        bottom_px = config.level_px[-1]
        self.middle_in = Block(config, bottom_px, widths[-1], widths[-1])
        self.middle_out = ResidualBlock(widths[-1], widths[-1], config.embedding_width)
        self.decoder = self._build_decoder(skip_widths)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], patch_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        assert self.conv_out.bias is not None
        nn.init.zeros_(self.conv_out.bias)

    def _build_encoder(self) -> tuple[nn.ModuleList, list[int]]:
        """Return the layers from fine to coarse, and the width of every skip connection."""
        config, layers = self.config, nn.ModuleList()
        width = config.widths[0]
        skip_widths = [width]  # conv_in's
        for level, (px, level_width) in enumerate(zip(config.level_px, config.widths, strict=True)):
            if level:
                layers.append(ResidualBlock(width, width, config.embedding_width, "down"))
                skip_widths.append(width)
            for _ in range(config.num_blocks):
                layers.append(Block(config, px, width, level_width))
                width = level_width
                skip_widths.append(width)
        return layers, skip_widths

    def _build_decoder(self, skip_widths: list[int]) -> nn.ModuleList:
        """Return the layers from coarse to fine; every `Block` consumes one skip connection."""
        config, layers = self.config, nn.ModuleList()
        width = config.widths[-1]
        skip_widths = list(skip_widths)
        for level in reversed(range(len(config.widths))):
            px, level_width = config.level_px[level], config.widths[level]
            for _ in range(config.num_blocks + 1):
                layers.append(Block(config, px, width + skip_widths.pop(), level_width))
                width = level_width
            if level:
                layers.append(ResidualBlock(width, width, config.embedding_width, "up"))
        assert not skip_widths
        return layers

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the whole network, encoders not included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, x_BCHW: Tensor, c_noise_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Return F, of the shape of `x_BCHW` (B, image_channels, image_px, image_px)."""
        embedding_BD = embed(self.noise_embedding, self.streams, c_noise_B, conditioning)
        context = None
        if self.config.cross_attention_px:
            context = self.streams.context(conditioning, c_noise_B)
        h = functional.pixel_unshuffle(x_BCHW, self.config.patch_px)
        h = self.conv_in(h.to(memory_format=torch.channels_last))
        skips = [h]
        for layer in self.encoder:
            h = self._step(layer, h, embedding_BD, context)
            skips.append(h)
        h = self._step(self.middle_in, h, embedding_BD, context)
        h = self._step(self.middle_out, h, embedding_BD, context)
        for layer in self.decoder:
            if isinstance(layer, Block):
                h = torch.cat([h, skips.pop()], dim=1)
            h = self._step(layer, h, embedding_BD, context)
        h = self.conv_out(functional.silu(self.norm_out(h)))
        return functional.pixel_shuffle(h, self.config.patch_px)

    def _step(
        self, layer: nn.Module, h: Tensor, embedding_BD: Tensor, context: Context | None
    ) -> Tensor:
        inputs = (embedding_BD, context) if isinstance(layer, Block) else (embedding_BD,)
        return apply(layer, h, *inputs, recompute=self.gradient_checkpointing)
