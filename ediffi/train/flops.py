"""Model FLOPs utilisation: what training one image costs, and what the device could do at best.

Counted are the multiplications and additions of matrix products and convolutions, forwards and
backwards, as the network asks for them: computing blocks again under gradient checkpointing does
not count (the usual definition of MFU, arXiv 2204.02311 appendix B). Optimizer, normalisation and
element-wise work do not either.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from ediffi.conditioning import Conditioning, Stream, StreamConfig
from ediffi.efficient_unet import EfficientUNetConfig
from ediffi.layers import TOKEN_MULTIPLE
from ediffi.network import Network, NetworkConfig, build_network
from ediffi.train.config import Precision

TERA = 1e12


@dataclass(frozen=True, kw_only=True)
class TrainingFlops:
    """Floating-point operations of one training image, forwards and backwards.

    Exact: they are affine in the tokens of each stream and in the padded length of the context.
    """

    without_tokens: float  # with the context that is left then
    per_token: Mapping[str, float]  # by stream; its projection alone
    per_context_token: float  # what all cross-attention layers do with one token
    num_own_tokens: int  # context tokens that no stream's length counts: null, pooled vectors

    def image(self, num_tokens: Mapping[str, int]) -> float:
        """FLOPs of one image with so many tokens a stream, padding to its batch included."""
        projected = sum(cost * num_tokens.get(name, 0) for name, cost in self.per_token.items())
        num_streamed = sum(num_tokens.get(name, 0) for name in self.per_token)
        num_added = self._padded(num_streamed) - self._padded(0)
        return self.without_tokens + projected + self.per_context_token * num_added

    def batch(self, conditioning: Conditioning) -> float:
        """FLOPs of a batch: all its images have the tokens that they were padded to."""
        num_tokens = {
            name: stream.tokens_BTD.shape[1]
            for name, stream in conditioning.streams.items()
            if stream.tokens_BTD is not None
        }
        return conditioning.batch_size * self.image(num_tokens)

    def _padded(self, num_streamed: int) -> int:
        """Length of the context, as `StreamProjections.context` pads it."""
        return -(-(self.num_own_tokens + num_streamed) // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


@cache
def count_flops(config: NetworkConfig) -> TrainingFlops:
    """Count on tensors without memory: a network of any size takes some seconds."""
    network = _meta_network(config)
    streams = [stream.name for stream in config.streams if stream.token_width]
    num_own_tokens = 1 + sum(stream.pooled_as_token for stream in config.streams)
    assert num_own_tokens % TOKEN_MULTIPLE, "one token more must not lengthen the context"
    without_tokens = _count(network, config, {})
    per_token = {name: _count(network, config, {name: 1}) - without_tokens for name in streams}
    per_context_token = 0.0
    for name in streams[:1]:
        longer = _count(network, config, {name: TOKEN_MULTIPLE}) - without_tokens
        per_context_token = longer / TOKEN_MULTIPLE - per_token[name]
    return TrainingFlops(
        without_tokens=without_tokens,
        per_token=per_token,
        per_context_token=per_context_token,
        num_own_tokens=num_own_tokens,
    )


def _meta_network(config: NetworkConfig) -> Network:
    with torch.device("meta"):
        return build_network(config)


def _count(network: Network, config: NetworkConfig, num_tokens: Mapping[str, int]) -> int:
    """FLOPs of one image. On the meta device attention falls apart into its matrix products."""
    with torch.device("meta"):
        x_BCHW = torch.empty(1, config.image_channels, config.image_px, config.image_px)
        conditioning = _conditioning(config, num_tokens)
        with FlopCounterMode(display=False) as counter:
            network(x_BCHW, torch.empty(1), conditioning).sum().backward()
        network.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def _conditioning(config: NetworkConfig, num_tokens: Mapping[str, int]) -> Conditioning:
    """An image's empty conditioning on the current device."""
    streams = {
        stream.name: _stream(stream, num_tokens.get(stream.name, 0)) for stream in config.streams
    }
    low_res_BCHW = None
    if isinstance(config, EfficientUNetConfig):
        low_res_BCHW = torch.empty(1, config.image_channels, config.low_res_px, config.low_res_px)
    return Conditioning(streams, 1, low_res_BCHW)


def _stream(config: StreamConfig, num_tokens: int) -> Stream:
    stream = Stream()
    if config.token_width:
        mask_BT = torch.empty(1, num_tokens, dtype=torch.bool)
        stream = Stream(torch.empty(1, num_tokens, config.token_width), mask_BT)
    if config.pooled_width:
        stream.pooled_BD = torch.empty(1, config.pooled_width)
    return stream


@dataclass(frozen=True, kw_only=True)
class PeakFlops:
    """What one device can do at best, and how that is known."""

    flops_per_s: float
    source: str  # for people: "published for …" or "measured …"

    def __str__(self) -> str:
        """As in `989.4 TFLOP/s, published for NVIDIA H100 80GB HBM3 in bf16`."""
        return f"{self.flops_per_s / TERA:.4g} TFLOP/s, {self.source}"


@dataclass(frozen=True)
class _Published:
    """Dense peaks in TFLOP/s; bf16 with float32 accumulation. None: the device has no such unit."""

    name: str  # regular expression in the name that torch gives the device
    bf16: float | None
    tf32: float | None
    fp32: float


# Figures of the vendors' data sheets, without sparsity: NVIDIA A100, A30, A40, A10, L4, L40, L40S,
# V100, T4, H100, H200, H20, HGX B200 and GB200 data sheets; the Ada, Ampere and Blackwell GPU
# architecture white papers for RTX; AMD's MI300X data sheet. The first match counts.
_PUBLISHED = (
    _Published(r"GB200", 2500, 1250, 80),
    _Published(r"\bB200\b", 2250, 1125, 75),
    _Published(r"\bH[12]00 NVL", 835.5, 417.5, 60),
    _Published(r"\bH[18]00 PCIe", 756, 378, 51),
    _Published(r"\bG?H200\b|\bGH200\b|\bH[18]00\b", 989.4, 494.7, 66.9),
    _Published(r"\bH20\b", 148, 74, 44),
    _Published(r"\bA[18]00\b", 312, 156, 19.5),
    _Published(r"\bA30\b", 165, 82, 10.3),
    _Published(r"\bA40\b", 149.7, 74.8, 37.4),
    _Published(r"\bA10G\b", 70, 35, 35),
    _Published(r"\bA10\b", 125, 62.5, 31.2),
    _Published(r"\bL40S\b", 362, 183, 91.6),
    _Published(r"\bL40\b", 181, 90.5, 90.5),
    _Published(r"\bL4\b", 121, 60, 30.3),
    _Published(r"\bV100-PCIE", None, None, 14),
    _Published(r"\bV100\b", None, None, 15.7),
    _Published(r"\bT4\b", None, None, 8.1),
    _Published(r"RTX 5090\b(?! Laptop)", 209.5, 104.8, 104.8),
    _Published(r"RTX 4090\b(?! Laptop)", 165.2, 82.6, 82.6),
    _Published(r"RTX 3090 Ti\b", 80, 40, 40),
    _Published(r"RTX 3090\b", 71, 35.6, 35.6),
    _Published(r"RTX A6000\b", 154.8, 77.4, 38.7),
    _Published(r"MI300X\b", 1307.4, None, 163.4),
)


def peak_flops(device: torch.device, precision: Precision) -> PeakFlops:
    """Best floating-point rate of one device: looked up by its name, else measured."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        # PyTorch lets convolutions of float32 use TF32 unless told otherwise.
        found = published_peak(name, precision, allow_tf32=torch.backends.cudnn.allow_tf32)
        if found is not None:
            return found
    return _measured_peak(device, precision, torch.get_num_threads())


def published_peak(name: str, precision: Precision, *, allow_tf32: bool) -> PeakFlops | None:
    """The vendor's figure for a device of this name; None if there is none for it."""
    for device in _PUBLISHED:
        if not re.search(device.name, name):
            continue
        kind, peak = "bf16", device.bf16
        if precision == "fp32":
            has_tf32 = allow_tf32 and device.tf32 is not None
            kind, peak = ("TF32", device.tf32) if has_tf32 else ("fp32", device.fp32)
        if peak is not None:
            return PeakFlops(flops_per_s=peak * TERA, source=f"published for {name} in {kind}")
        return None
    return None


@cache
def _measured_peak(device: torch.device, precision: Precision, num_threads: int) -> PeakFlops:
    """The best of some square matrix products: at least three, about half a second of them."""
    side = 1024 if device.type == "cpu" else 8192
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.linspace(-1, 1, side * side, device=device).view(side, side) for _ in range(2))
    a, b, product = a.to(dtype), b.to(dtype), torch.empty(side, side, dtype=dtype, device=device)
    torch.mm(a, b, out=product)  # warm up
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < 0.5:
        _finish(device)
        started_s = time.perf_counter()
        torch.mm(a, b, out=product)
        _finish(device)
        seconds.append(time.perf_counter() - started_s)
    threads = f", {num_threads} threads" if device.type == "cpu" else ""
    return PeakFlops(
        flops_per_s=2 * side**3 / min(seconds),
        source=f"measured on this {device.type} by matrix products in {precision}{threads}",
    )


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
