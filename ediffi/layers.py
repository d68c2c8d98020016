"""Building blocks of the U-Net: noise embedding, residual and attention blocks, stream projections.

Residual blocks are ADM's, with scale-shift normalisation and the resampling inside (paper
section 4). Each stream has its own projection into one shared context, to which a learned null
token is always appended (paper section 3).

Shapes: B batch, C channels, H W feature map, I queries (pixels), T tokens, D width, N heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ediffi.attention import (
    NULL,
    Context,
    ContextPart,
    attention,
    attention_weights,
    join_context,
    merge_pixels,
    split_pixels,
    split_tokens,
)
from ediffi.conditioning import Conditioning, Stream, StreamConfig

Resampling = Literal["keep", "down", "up"]

# Wavelengths of c_noise = ln(sigma) / 4, whose useful range is about [-1.9, 1.2]: the longest
# tells its two ends apart without wrapping around, the shortest resolves 1 % of sigma.
LONGEST_WAVE = 8.0
SHORTEST_WAVE = 0.05

# Contexts are padded (and masked) to a multiple of one AVX-512 register of floats: softmax over 13
# tokens takes eight times as long on a CPU as over 16. GPU kernels like aligned masks as well.
TOKEN_MULTIPLE = 16


def fourier_features(c_noise_B: Tensor, width: int) -> Tensor:
    """Embed (B,) noise levels as (B, width) sines and cosines of log-spaced frequencies."""
    frequencies = torch.logspace(
        math.log10(2 * math.pi / LONGEST_WAVE),
        math.log10(2 * math.pi / SHORTEST_WAVE),
        width // 2,
        device=c_noise_B.device,
    )
    angles = c_noise_B.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def noise_mlp(in_width: int, embedding_width: int) -> nn.Sequential:
    """Return the two layers from Fourier features to the noise embedding."""
    return nn.Sequential(
        nn.Linear(in_width, embedding_width),
        nn.SiLU(),
        nn.Linear(embedding_width, embedding_width),
    )


def embed(
    mlp: nn.Sequential, streams: StreamProjections, c_noise_B: Tensor, conditioning: Conditioning
) -> Tensor:
    """Return the activated (B, embedding_width) sum of noise embedding and pooled vectors.

    Args:
        mlp: of `noise_mlp`.
        streams: the network's.
        c_noise_B: ln(sigma) / 4.
        conditioning: of the batch.
    """
    first = mlp[0]
    assert isinstance(first, nn.Linear)
    embedding_BD = mlp(fourier_features(c_noise_B, first.in_features))
    for pooled_BD in streams.embed(conditioning):
        embedding_BD = embedding_BD + pooled_BD
    return functional.silu(embedding_BD)


def apply(block: nn.Module, *inputs: object, recompute: bool) -> Tensor:
    """Call a block; with `recompute` its activations are computed again backwards, not kept.

    Gradients are equal bit by bit: nothing in a block is random.
    """
    if recompute and torch.is_grad_enabled():
        output: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return output
    return block(*inputs)


class GroupNorm(nn.GroupNorm):
    """Group normalisation in float32, as autocast has it on GPUs; returns the input's dtype.

    On a CPU torch's bf16 kernel for channels-last takes three to six times as long.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return super().forward(x_BCHW.float()).to(x_BCHW.dtype)


def group_norm(width: int, affine: bool = True) -> nn.GroupNorm:
    """Return ADM's 32 groups, or fewer for narrow layers: a group never has under 4 channels."""
    return GroupNorm(math.gcd(32, width // 4), width, affine=affine)


# On pixels the projections are 1x1 convolutions, as in ADM: on a CPU these take two thirds of the
# time of nn.Linear. Queries, keys and values need no bias: normalisation or projection precedes.


class SelfAttention(nn.Module):
    """Every pixel of the feature map attends to every other; residual."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.norm = group_norm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=False)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        qkv = self.qkv(self.norm(x_BCHW)).chunk(3, dim=1)
        q, k, v = (split_pixels(part, self.head_width) for part in qkv)
        return x_BCHW + self.out(merge_pixels(attention(q, k, v), x_BCHW))


class CrossAttention(nn.Module):
    """Every pixel of the feature map attends to the context's unmasked tokens; residual."""

    def __init__(self, width: int, head_width: int, context_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.norm = group_norm(width)
        self.q = nn.Conv2d(width, width, 1, bias=False)
        self.kv = nn.Linear(context_width, 2 * width, bias=False)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x_BCHW: Tensor, context: Context) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        q, k, v = self._queries_keys_values(x_BCHW, context)
        attended = attention(q, k, v, context.mask_BT, context.score_hook(x_BCHW))
        return x_BCHW + self.out(merge_pixels(attended, x_BCHW))

    def weights(self, x_BCHW: Tensor, context: Context) -> Tensor:
        """What `forward` lets each pixel give to each token: (B, N, H*W, T), sums of 1."""
        q, k, _ = self._queries_keys_values(x_BCHW, context)
        return attention_weights(q, k, context.mask_BT, context.score_hook(x_BCHW))

    def _queries_keys_values(
        self, x_BCHW: Tensor, context: Context
    ) -> tuple[Tensor, Tensor, Tensor]:
        q = split_pixels(self.q(self.norm(x_BCHW)), self.head_width)
        kv = self.kv(context.tokens_BTD).chunk(2, dim=-1)
        k, v = (split_tokens(part, self.head_width) for part in kv)
        return q, k, v


def resample(x_BCHW: Tensor, resampling: Resampling) -> Tensor:
    """Halve a feature map by averaging, double it by repetition, or keep it."""
    if resampling == "down":
        return functional.avg_pool2d(x_BCHW, 2)
    if resampling == "up":
        return functional.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
    return x_BCHW


class ResidualBlock(nn.Module):
    """ADM's residual block: scale-shift normalisation, resampling between norm and convolution."""

    def __init__(
        self,
        in_width: int,
        out_width: int,
        embedding_width: int,
        resampling: Resampling = "keep",
    ) -> None:
        super().__init__()
        self.resampling = resampling
        self.norm_in = group_norm(in_width)
        self.conv_in = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.scale_shift = nn.Linear(embedding_width, 2 * out_width)
        self.norm_out = group_norm(out_width, affine=False)  # scale_shift is its affine map
        self.conv_out = nn.Conv2d(out_width, out_width, 3, padding=1)
        same = in_width == out_width
        self.skip = nn.Identity() if same else nn.Conv2d(in_width, out_width, 1)

    def forward(self, x_BCHW: Tensor, embedding_BD: Tensor) -> Tensor:
        """Map (B, in_width, H, W) to (B, out_width, H', W'); `embedding_BD` is activated."""
        h = functional.silu(self.norm_in(x_BCHW))
        h = self.conv_in(resample(h, self.resampling))
        scale, shift = self.scale_shift(embedding_BD)[:, :, None, None].chunk(2, dim=1)
        h = functional.silu(torch.addcmul(shift, self.norm_out(h), 1 + scale))
        return self.skip(resample(x_BCHW, self.resampling)) + self.conv_out(h)


def _projection(in_width: int, out_width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(in_width), nn.Linear(in_width, out_width))


class StreamProjection(nn.Module):
    """One encoder's own way into the shared context and into the noise embedding."""

    def __init__(self, config: StreamConfig, context_width: int, embedding_width: int) -> None:
        super().__init__()
        self.config = config
        if config.token_width:
            self.tokens = _projection(config.token_width, context_width)
        if config.pooled_as_token:
            self.pooled_token = _projection(config.pooled_width, context_width)
        if config.pooled_width:
            self.pooled = _projection(config.pooled_width, embedding_width)

    def context(self, stream: Stream) -> list[ContextPart]:
        """Project the tokens, and the pooled vector where it is a token, to context_width.

        A dropped pooled vector stays a token, as in the paper: zeros give a learned constant.
        """
        parts, name = [], self.config.name
        if self.config.token_width:
            tokens_BTD, mask_BT = self._present(stream.tokens_BTD), self._present(stream.mask_BT)
            tokens_BTD = _apply(self.tokens, tokens_BTD)
            parts.append(ContextPart(name, tokens_BTD, mask_BT, stream.paint_BTHW))
        if self.config.pooled_as_token:
            pooled_BD = _apply(self.pooled_token, self._present(stream.pooled_BD))
            parts.append(_one_token(name, pooled_BD[:, None]))
        return parts

    def embed(self, stream: Stream) -> Tensor:
        """Project the pooled vector to (B, embedding_width)."""
        return _apply(self.pooled, self._present(stream.pooled_BD))

    def _present(self, part: Tensor | None) -> Tensor:
        if part is None:
            raise ValueError(
                f"stream {self.config.name} must have token width {self.config.token_width} and "
                f"pooled width {self.config.pooled_width}, got no such tensor; collate the batch "
                "with the network's own streams"
            )
        return part


def _one_token(name: str, token_B1D: Tensor) -> ContextPart:
    """A part of the context that is one token, never masked."""
    return ContextPart(name, token_B1D, torch.ones_like(token_B1D[..., 0], dtype=torch.bool))


def _apply(projection: nn.Sequential, embeddings: Tensor) -> Tensor:
    """Project cached embeddings, whatever their storage dtype."""
    return projection(embeddings.to(next(projection.parameters()).dtype))


class StreamProjections(nn.Module):
    """All streams of a conditioning, as one context and one addition to the noise embedding."""

    def __init__(
        self, configs: Sequence[StreamConfig], context_width: int, embedding_width: int
    ) -> None:
        super().__init__()
        self.projections = nn.ModuleDict(
            {c.name: StreamProjection(c, context_width, embedding_width) for c in configs}
        )
        if any(config.has_context for config in configs):
            self.null_token_D = nn.Parameter(torch.randn(context_width))

    def _streams(self, conditioning: Conditioning) -> list[tuple[StreamProjection, Stream]]:
        """Pair each stream with its projection, in the configured order."""
        pairs = []
        for name, projection in self.projections.items():
            if name not in conditioning.streams:
                raise ValueError(
                    f"conditioning must have the streams {', '.join(self.projections)}; {name} is "
                    "missing: collate the batch with the network's own streams"
                )
            assert isinstance(projection, StreamProjection)
            pairs.append((projection, conditioning.streams[name]))
        return pairs

    def context(self, conditioning: Conditioning, c_noise_B: Tensor) -> Context:
        """Concatenate the streams in their configured order, then the null token, then padding.

        Args:
            conditioning: of the batch.
            c_noise_B: ln(sigma) / 4; what is painted weighs more at high noise.
        """
        parts = [
            part
            for projection, stream in self._streams(conditioning)
            for part in projection.context(stream)
        ]
        null_D = self.null_token_D.to(parts[0].tokens_BTD.dtype)
        parts.append(_one_token(NULL, null_D.expand(conditioning.batch_size, 1, -1)))
        return join_context(parts, c_noise_B, multiple=TOKEN_MULTIPLE)

    def embed(self, conditioning: Conditioning) -> list[Tensor]:
        """Project each pooled vector to (B, embedding_width), to be added to the noise's."""
        return [
            projection.embed(stream)
            for projection, stream in self._streams(conditioning)
            if projection.config.pooled_width
        ]
