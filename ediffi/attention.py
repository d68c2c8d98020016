"""Softmax attention, what cross-attention attends to, and painting with words in its scores.

Painting with words (paper section 5) adds w A to the scores of every cross-attention layer,
softmax((QK^T + w A) / sqrt(d)) V, where A says which token is wanted at which pixel and
w = w' log(1 + sigma) max(QK^T). No layer learns anything for it.

Shapes: B batch, C channels, H W feature map, I queries (pixels), T tokens, D width, N heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ediffi.paint_planes import resize_paint

ScoreHook = Callable[[Tensor], Tensor]

NULL = "null"  # what the learned null token is called among the streams


class PaintedScores:
    """What a painting adds to the scores of cross-attention, for feature maps of any size.

    Args:
        paint_BTHW: w' A of every context token, (B, T, H, W).
        c_noise_B: ln(sigma) / 4.
        mask_BT: True = real token; the others do not count in max(QK^T).
    """

    def __init__(self, paint_BTHW: Tensor, c_noise_B: Tensor, mask_BT: Tensor) -> None:
        # log(1 + sigma) = softplus(ln(sigma)), which neither overflows nor loses small sigma
        growth_B = functional.softplus(4 * c_noise_B.float())
        self._weight_BTHW = growth_B[:, None, None, None] * paint_BTHW.float()
        self._mask_BT = mask_BT
        self._at_size: dict[tuple[int, int], Tensor] = {}

    def score_hook(self, size: tuple[int, int]) -> ScoreHook:
        """Return what adds w A to the scores of a layer whose feature map has (H, W) = `size`."""
        if size not in self._at_size:  # layers of one resolution share it
            weight_BTHW = resize_paint(self._weight_BTHW, size)
            self._at_size[size] = weight_BTHW.flatten(2).transpose(1, 2)[:, None]
        weight_B1IT = self._at_size[size]
        padding_B11T = ~self._mask_BT[:, None, None]

        def add(scores_BNIT: Tensor) -> Tensor:
            # Scores come divided by sqrt(d), and so does their maximum: w A is divided as well.
            # One maximum a sample, or a picture would depend on the others in its batch.
            real_BNIT = scores_BNIT.masked_fill(padding_B11T, -math.inf)
            return scores_BNIT + weight_B1IT * real_BNIT.amax((1, 2, 3), keepdim=True)

        return add


class Context(NamedTuple):
    """What cross-attention attends to."""

    tokens_BTD: Tensor
    mask_BT: Tensor
    columns: tuple[tuple[str, int], ...] = ()  # names and numbers of tokens; padding follows
    painting: PaintedScores | None = None

    def score_hook(self, like_BCHW: Tensor) -> ScoreHook | None:
        """Return what painting does to the scores of a layer; None where nothing is painted."""
        if self.painting is None:
            return None
        height, width = like_BCHW.shape[2:]
        return self.painting.score_hook((height, width))


class ContextPart(NamedTuple):
    """Tokens of one stream, or the null token, on their way into a context."""

    name: str  # of the stream, or NULL
    tokens_BTD: Tensor
    mask_BT: Tensor
    paint_BTHW: Tensor | None = None


def join_context(parts: Sequence[ContextPart], c_noise_B: Tensor, *, multiple: int) -> Context:
    """Concatenate parts in order, then masked padding up to a `multiple` of tokens.

    Args:
        parts: at least one.
        c_noise_B: ln(sigma) / 4.
        multiple: what the number of tokens must be divisible by.
    """
    tokens_BTD = torch.cat([part.tokens_BTD for part in parts], dim=1)
    mask_BT = torch.cat([part.mask_BT for part in parts], dim=1)
    num_padding = -mask_BT.shape[1] % multiple
    tokens_BTD = functional.pad(tokens_BTD, (0, 0, 0, num_padding))
    mask_BT = functional.pad(mask_BT, (0, num_padding))
    columns = tuple((part.name, part.tokens_BTD.shape[1]) for part in parts)
    paint_BTHW = _join_paint(parts, num_padding)
    painting = None if paint_BTHW is None else PaintedScores(paint_BTHW, c_noise_B, mask_BT)
    return Context(tokens_BTD, mask_BT, columns, painting)


def _join_paint(parts: Sequence[ContextPart], num_padding: int) -> Tensor | None:
    """Lay paint out as the context's tokens lie, blank where there is none."""
    painted = [part.paint_BTHW for part in parts if part.paint_BTHW is not None]
    if not painted:
        return None
    size = (max(paint.shape[2] for paint in painted), max(paint.shape[3] for paint in painted))
    planes = [
        painted[0].new_zeros(*part.mask_BT.shape, *size, dtype=torch.float32)
        if part.paint_BTHW is None
        else resize_paint(part.paint_BTHW, size)
        for part in parts
    ]
    return functional.pad(torch.cat(planes, dim=1), (0, 0, 0, 0, 0, num_padding))


def attention(
    q_BNID: Tensor,
    k_BNTD: Tensor,
    v_BNTD: Tensor,
    mask_BT: Tensor | None = None,
    score_hook: ScoreHook | None = None,
) -> Tensor:
    """Softmax attention, (B, N, I, D). Tokens whose `mask_BT` is False get no weight.

    `score_hook` maps the pre-softmax scores QK^T / sqrt(D), (B, N, I, T), to other scores;
    masking follows it, so that no hook can revive padding.
    """
    # The fused kernel is fastest, except for bf16 on a CPU: six times slower there for small heads.
    slow_kernel = q_BNID.device.type == "cpu" and q_BNID.dtype != torch.float32
    if score_hook is None and not slow_kernel:
        mask = None if mask_BT is None else mask_BT[:, None, None, :]
        return functional.scaled_dot_product_attention(q_BNID, k_BNTD, v_BNTD, attn_mask=mask)
    weights_BNIT = attention_weights(q_BNID, k_BNTD, mask_BT, score_hook)
    return weights_BNIT.to(v_BNTD.dtype) @ v_BNTD


def attention_weights(
    q_BNID: Tensor,
    k_BNTD: Tensor,
    mask_BT: Tensor | None = None,
    score_hook: ScoreHook | None = None,
) -> Tensor:
    """The softmax of `attention`, (B, N, I, T): what each query gives to each token."""
    scores_BNIT = (q_BNID * q_BNID.shape[-1] ** -0.5) @ k_BNTD.transpose(-1, -2)
    if score_hook is not None:
        scores_BNIT = score_hook(scores_BNIT)
    if mask_BT is not None:
        scores_BNIT = scores_BNIT.masked_fill(~mask_BT[:, None, None, :], -math.inf)
    return scores_BNIT.softmax(dim=-1)


def split_pixels(x_BCHW: Tensor, head_width: int) -> Tensor:
    """View a channels-last feature map as (B, N, H*W, D)."""
    return x_BCHW.flatten(2).unflatten(1, (-1, head_width)).transpose(2, 3)


def split_tokens(x_BTC: Tensor, head_width: int) -> Tensor:
    """View tokens as (B, N, T, D)."""
    return x_BTC.unflatten(-1, (-1, head_width)).transpose(1, 2)


def merge_pixels(x_BNID: Tensor, like_BCHW: Tensor) -> Tensor:
    """Undo `split_pixels`, again channels-last."""
    return x_BNID.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, like_BCHW.shape[2:])
