"""What one pass of an encoder gives: converted, checked and counted before it leaves the device.

A whole batch is converted to its storage type, checked for NaN and inf, and copied to the CPU at
once; only there it is split into samples. A device is therefore waited for once a batch.

Shape legend: B batch, T tokens (padded to the longest), D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ediffi.encoding.quantization import SCALE, TOKENS, cosine_error, quantize_tokens

NUM_NAN, NUM_INF, COSINE_ERROR = "num_nan", "num_inf", "cosine_error"


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """Samples of one pass, as they are stored, and what was seen of each.

    tensors: "tokens" (B, T, D), with int8 also "tokens_scale" (B, T), and "pooled" (B, D).
    lengths: how many of the T token rows belong to each sample; all that follow are padding.
    checks: "num_nan" and "num_inf" (B,), counted before storage; with int8 also "cosine_error"
        (B, T), 0 on padding.
    """

    tensors: Mapping[str, Tensor]
    lengths: Sequence[int]
    checks: Mapping[str, Tensor]
    arrived: Callable[[], None] = field(default=lambda: None)

    def to_cpu(self) -> EncodedBatch:
        """Start copying everything to the CPU; call `arrived` before reading what comes back."""
        device = next(iter(self.tensors.values())).device
        if device.type != "cuda":
            tensors = {name: tensor.cpu() for name, tensor in self.tensors.items()}
            checks = {name: tensor.cpu() for name, tensor in self.checks.items()}
            return EncodedBatch(tensors=tensors, lengths=self.lengths, checks=checks)
        tensors = {name: _start_copy(tensor) for name, tensor in self.tensors.items()}
        checks = {name: _start_copy(tensor) for name, tensor in self.checks.items()}
        copied = torch.cuda.current_stream(device).record_event()
        return EncodedBatch(
            tensors=tensors, lengths=self.lengths, checks=checks, arrived=copied.synchronize
        )

    def samples(self) -> Iterator[dict[str, Tensor]]:
        """Split into samples: "tokens" (T, D) without padding, "tokens_scale" (T,), "pooled" (D,).

        They are views into the batch; a caller who keeps one clones it.
        """
        for i, length in enumerate(self.lengths):
            yield {
                name: tensor[i, :length] if name in (TOKENS, SCALE) else tensor[i]
                for name, tensor in self.tensors.items()
            }


def encoded_batch(
    raw: Mapping[str, Tensor], lengths: Sequence[int], storage_dtype: str
) -> EncodedBatch:
    """Convert what a network gave to what is stored.

    Args:
        raw: "tokens" (B, T, D) and/or "pooled" (B, D), floating point.
        lengths: of every sample, in tokens; what follows is padding and is not looked at.
        storage_dtype: fp32, bf16 or int8.
    """
    dtype = torch.float32 if storage_dtype == "fp32" else torch.bfloat16
    stored = {name: tensor.to(dtype) for name, tensor in raw.items()}
    checks = _count_not_finite(raw, lengths)
    if storage_dtype == "int8" and TOKENS in raw:
        tokens_BTD, scale_BT = quantize_tokens(raw[TOKENS])
        stored = {**stored, TOKENS: tokens_BTD, SCALE: scale_BT}
        read_BTD = (tokens_BTD * scale_BT[..., None]).to(torch.bfloat16)  # as it will be read
        error_BT = cosine_error(raw[TOKENS], read_BTD)
        checks[COSINE_ERROR] = error_BT.masked_fill(~_mask(raw[TOKENS], lengths), 0.0)
    return EncodedBatch(tensors=stored, lengths=tuple(lengths), checks=checks)


def _count_not_finite(raw: Mapping[str, Tensor], lengths: Sequence[int]) -> dict[str, Tensor]:
    # NaN and inf survive a sum, so that one pass clears a sound batch. Not on a GPU, where looking
    # at the sum would mean waiting for it.
    if not any(tensor.is_cuda or not tensor.sum().isfinite() for tensor in raw.values()):
        none_B = torch.zeros(len(lengths), dtype=torch.long)
        return {NUM_NAN: none_B, NUM_INF: none_B}
    counts = {}
    for name, is_bad in ((NUM_NAN, torch.isnan), (NUM_INF, torch.isinf)):
        counts_B: Tensor | int = 0
        for stream, tensor in raw.items():
            bad = is_bad(tensor)
            if stream == TOKENS:
                bad = bad & _mask(tensor, lengths)[..., None]
            counts_B = counts_B + bad.flatten(1).sum(dim=1)
        counts[name] = torch.as_tensor(counts_B)
    return counts


def _mask(tokens_BTD: Tensor, lengths: Sequence[int]) -> Tensor:
    """Which rows are no padding, bool (B, T)."""
    device = tokens_BTD.device
    position_T = torch.arange(tokens_BTD.shape[1], device=device)
    length_B = torch.tensor(lengths).to(device, non_blocking=True)
    return position_T < length_B[:, None]


def _start_copy(tensor: Tensor) -> Tensor:
    target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return target.copy_(tensor, non_blocking=True)
