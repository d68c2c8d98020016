"""What cross-attention looks at: its share by stream, and where each token is looked at.

The paper reports that attention to text is strong at high noise and moves to the null token at low
noise (section 3). Here that can be measured, for any denoiser made of the networks of this library.
While it is measured, and only then, attention is computed a second time beside the network.

Shapes: B batch, C channels, H W picture or map, I queries (pixels), T tokens, N heads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook

from ediffi.attention import Context
from ediffi.conditioning import Conditioning
from ediffi.layers import CrossAttention
from ediffi.preconditioning import DenoiserFn

# What is kept of one layer: (weights, mean over heads (B, T, H, W); its context).
_Record = Callable[[Tensor, Context], None]


def attention_by_stream(
    denoiser: DenoiserFn, x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning
) -> dict[str, Tensor]:
    """Measure which share of cross-attention each stream gets.

    Args:
        denoiser: base, expert or ensemble; not guided, whose null branch attends as well.
        x_BCHW: noisy pictures.
        sigma_B: their noise levels; each distinct one is a call, so that routing sees it whole.
        conditioning: of the pictures.

    Returns:
        (B,) float32 on the CPU for each stream with tokens and for "null", the null token. Means
        over pixels, heads and layers; they sum to 1 for each picture.

    Raises:
        ValueError: the denoiser has no cross-attention, or is called with other batches.
    """

    def reduced(weights_BTHW: Tensor) -> Tensor:
        return weights_BTHW.mean((2, 3))

    shares_BT, columns = _mean_over_layers(denoiser, x_BCHW, sigma_B, conditioning, reduced)
    shares: dict[str, Tensor] = {}
    start = 0
    for name, num_tokens in columns:
        share_B = shares_BT[:, start : start + num_tokens].sum(1)
        shares[name] = shares[name] + share_B if name in shares else share_B
        start += num_tokens
    return shares


def token_maps(
    denoiser: DenoiserFn,
    x_BCHW: Tensor,
    sigma_B: Tensor,
    conditioning: Conditioning,
    *,
    stream: str,
) -> Tensor:
    """Measure where the tokens of one stream are looked at.

    Args:
        denoiser: as for `attention_by_stream`.
        x_BCHW: noisy pictures.
        sigma_B: their noise levels.
        conditioning: of the pictures.
        stream: by name, or "null".

    Returns:
        (B, T, H, W) float32 on the CPU at the pictures' size, bilinearly enlarged: the share of
        attention that each pixel gives to each token, 0 for padding; means over heads and layers.
        A pooled vector that serves as token follows the stream's tokens.

    Raises:
        ValueError: cross-attention does not see such a stream; else as `attention_by_stream`.
    """
    size = x_BCHW.shape[2:]

    def resized(weights_BTHW: Tensor) -> Tensor:
        return functional.interpolate(
            weights_BTHW, size=size, mode="bilinear", align_corners=False, antialias=True
        )

    maps_BTHW, columns = _mean_over_layers(denoiser, x_BCHW, sigma_B, conditioning, resized)
    names = [name for name, num_tokens in columns for _ in range(num_tokens)]
    if stream not in dict(columns):
        raise ValueError(
            f"stream must be one that cross-attention sees, {', '.join(dict(columns))}; "
            f"got {stream!r}"
        )
    return maps_BTHW[:, [index for index, name in enumerate(names) if name == stream]]


@torch.no_grad()
def _mean_over_layers(
    denoiser: DenoiserFn,
    x_BCHW: Tensor,
    sigma_B: Tensor,
    conditioning: Conditioning,
    reduce: Callable[[Tensor], Tensor],
) -> tuple[Tensor, tuple[tuple[str, int], ...]]:
    """Mean of `reduce`(weights) over all layers, (B, T, ...), and the columns of the context."""
    mean: Tensor | None = None
    columns: tuple[tuple[str, int], ...] = ()
    for sigma in sigma_B.unique():
        chosen = (sigma_B == sigma).nonzero().flatten()
        seen: list[Tensor] = []

        def record(weights_BTHW: Tensor, context: Context, seen: list[Tensor] = seen) -> None:
            nonlocal columns
            seen.append(reduce(weights_BTHW).cpu())
            columns = context.columns

        with _recording(record):
            denoiser(x_BCHW[chosen], sigma_B[chosen], conditioning.select(chosen))
        if not seen or any(len(one) != len(chosen) for one in seen):
            raise ValueError(
                "attention can be measured of a denoiser with cross-attention that calls its "
                f"network with the {len(chosen)} samples it is given, got batches of "
                f"{sorted({len(one) for one in seen}) or 'no layer at all'}; "
                "measure the denoiser without guidance"
            )
        layers_mean = torch.stack(seen).mean(0)
        if mean is None:
            mean = layers_mean.new_zeros(len(x_BCHW), *layers_mean.shape[1:])
        mean[chosen.cpu()] = layers_mean
    if mean is None:
        raise ValueError("attention can be measured of at least one picture, got none")
    return mean, columns


@contextmanager
def _recording(record: _Record) -> Iterator[None]:
    """Call `record` after each cross-attention layer that this thread runs.

    A hook on all modules: an ensemble may load its experts only when they are called.
    """
    thread = threading.get_ident()

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(module, CrossAttention) and threading.get_ident() == thread:
            x_BCHW, context = inputs
            weights_BIT = module.weights(x_BCHW, context).float().mean(1)
            record(weights_BIT.transpose(1, 2).unflatten(2, x_BCHW.shape[2:]), context)

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
