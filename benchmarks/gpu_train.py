"""Training speed of the paper's base U-Net on one GPU: `python -m benchmarks.gpu_train`.

Needs this checkout and torch, no other package of the project's. Images per second and model FLOPs
utilisation of whole steps in bf16 autocast: forward, backward, clipping, AdamW and EMA, weights
and optimizer in fp32, on a batch that lies in the GPU's memory. Every variant takes the largest
batch that fits, found by halving. The variants do not fit side by side, so they run one after
another; the first is what the others are compared with. `--tiny` runs on any machine.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.interleave import row, write_rows
from benchmarks.report import Row
from ediffi.conditioning import Conditioning, Stream, StreamConfig
from ediffi.loss import denoising_loss
from ediffi.noise import WHOLE, SigmaDistribution
from ediffi.preconditioning import Denoiser, Preconditioning
from ediffi.train.flops import TERA, PeakFlops, count_flops, peak_flops
from ediffi.unet import UNet, UNetConfig

COMMAND = "python -m benchmarks.gpu_train"

# The network of pipelines/recipes/ediffi-64px.yaml, written out as this runs without yaml. Widths
# of the streams: T5 v1.1 XXL, CLIP ViT-L/14.
PAPER = UNetConfig(
    image_px=64,
    widths=(256, 512, 1024, 1024),
    num_blocks=3,
    self_attention_px=(32, 16, 8),
    cross_attention_px=(32, 16, 8),
    head_width=64,
    context_width=1024,
    embedding_width=1024,
    streams=(
        StreamConfig(name="t5", token_width=4096),
        StreamConfig(name="clip_text", token_width=768, pooled_width=768),
        StreamConfig(name="clip_image", pooled_width=768, pooled_as_token=True),
    ),
)
NUM_TOKENS = {"t5": 113, "clip_text": 77}
TINY = UNetConfig(
    image_px=16,
    widths=(16, 32),
    num_blocks=1,
    self_attention_px=(8,),
    cross_attention_px=(8,),
    head_width=16,
    context_width=32,
    embedding_width=32,
    streams=PAPER.streams,
)
PRECONDITIONING = Preconditioning()
WARMUP_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How the same network is run."""

    name: str
    channels_last: bool = False  # weights too; feature maps always are
    gradient_checkpointing: bool = False
    compile: bool = False


VARIANTS = (
    Variant(name="eager"),
    Variant(name="channels_last", channels_last=True),
    Variant(name="checkpointing", gradient_checkpointing=True),
    Variant(name="compile", channels_last=True, compile=True),
    Variant(
        name="compile+checkpointing",
        channels_last=True,
        gradient_checkpointing=True,
        compile=True,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What one variant reached."""

    batch_images: int
    images_per_s: list[float]  # one a run
    memory_gib: float  # the most that was allocated; 0 on a CPU


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the rows; `--json` writes them to a file."""
    names = [variant.name for variant in VARIANTS]
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a toy network: a smoke test")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--variants", nargs="+", choices=names, default=names)
    parser.add_argument("--batch-images", type=int, default=512, help="tried first, then halved")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="of one run")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        print("no CUDA device here: use --tiny for a smoke test on the CPU", file=sys.stderr)
        return 2
    config = TINY if options.tiny else PAPER
    peak = peak_flops(device, "bf16")
    image_flops = count_flops(config).image(NUM_TOKENS)
    with torch.device("meta"):
        num_parameters = UNet(config).num_parameters
    print(
        f"{num_parameters:,} parameters, {image_flops / TERA:.3g} TFLOP an image; {peak}",
        file=sys.stderr,
    )
    speeds: dict[str, Speed] = {}
    for variant in VARIANTS:
        if variant.name in options.variants:
            # Compiling for a batch that does not fit takes minutes: begin at one that does.
            known = [speed.batch_images for speed in speeds.values()] if variant.compile else []
            first = max(known, default=options.batch_images)
            speeds[variant.name] = measure(
                config, variant, device, first, runs=options.runs, num_steps=options.steps
            )
            print(f"{variant.name}: {asdict(speeds[variant.name])}", file=sys.stderr)
    write_rows(rows(speeds, image_flops, peak, device), options.json)
    return 0


def measure(
    config: UNetConfig,
    variant: Variant,
    device: torch.device,
    first_batch_images: int,
    *,
    runs: int,
    num_steps: int,
) -> Speed:
    """Time steps with the largest batch that fits among `first_batch_images` and its halves.

    Raises:
        ValueError: not even one image fits.
    """
    batch_images = first_batch_images
    while batch_images:
        try:
            return _measure(config, variant, device, batch_images, runs, num_steps)
        except torch.OutOfMemoryError:
            print(f"{variant.name}: {batch_images} images do not fit", file=sys.stderr)
        # Outside the handler: the exception's frames hold the tensors.
        _free(device)
        batch_images //= 2
    raise ValueError(f"one image must fit into the memory of {_device_name(device)}")


def _measure(
    config: UNetConfig,
    variant: Variant,
    device: torch.device,
    batch_images: int,
    runs: int,
    num_steps: int,
) -> Speed:
    training = Training(config, variant, device, batch_images)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    training.seconds(WARMUP_STEPS)
    seconds = [training.seconds(num_steps) for _ in range(runs)]
    memory_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    del training
    _free(device)
    return Speed(
        batch_images=batch_images,
        images_per_s=[batch_images * num_steps / taken for taken in seconds],
        memory_gib=memory_bytes / 2**30,
    )


class Training:
    """A network with everything that a step of training does to it."""

    def __init__(
        self, config: UNetConfig, variant: Variant, device: torch.device, batch_images: int
    ) -> None:
        torch.manual_seed(0)
        self._device = device
        with device:
            network = UNet(config).train()
        network.gradient_checkpointing = variant.gradient_checkpointing
        if variant.channels_last:
            network = network.to(memory_format=torch.channels_last)
        self._weights: list[Tensor] = list(network.parameters())
        self._optimizer = torch.optim.AdamW(self._weights, lr=1e-4, fused=True)
        self._averages = [weight.detach().clone() for weight in self._weights]
        called: Any = network
        if variant.compile:
            torch.compiler.reset()  # of what another variant or batch left
            called = torch.compile(network, dynamic=False)
        self._denoiser = Denoiser(_Autocast(called, device.type), PRECONDITIONING)
        shape = (batch_images, config.image_channels, config.image_px, config.image_px)
        self._images_BCHW = torch.rand(shape, device=device) * 2 - 1
        self._conditioning = _conditioning(config.streams, batch_images, device)

    def seconds(self, num_steps: int) -> float:
        """Time that many whole steps."""
        self._wait()
        started_s = time.perf_counter()
        for _ in range(num_steps):
            self._step()
        self._wait()
        return time.perf_counter() - started_s

    def _step(self) -> None:
        num_images = len(self._images_BCHW)
        u_B = torch.rand(num_images, dtype=torch.float64, device=self._device)
        loss_B = denoising_loss(
            self._denoiser,
            self._images_BCHW,
            SigmaDistribution().sigma_at(u_B, WHOLE),
            torch.randn_like(self._images_BCHW),
            self._conditioning,
            PRECONDITIONING,
        )
        loss_B.mean().backward()
        nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self._weights, 1e-4)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _Autocast(nn.Module):
    """Only the network runs in bf16, as in training."""

    def __init__(self, network: nn.Module, device_type: str) -> None:
        super().__init__()
        self.network = network
        self._device_type = device_type

    def forward(self, *inputs: Any) -> Tensor:
        with torch.autocast(self._device_type, torch.bfloat16):
            output: Tensor = self.network(*inputs)
        return output


def _conditioning(
    streams: Sequence[StreamConfig], batch_images: int, device: torch.device
) -> Conditioning:
    """Captions of full length, the most that training ever has to do."""
    made = {}
    for config in streams:
        stream = Stream()
        if config.token_width:
            shape = (batch_images, NUM_TOKENS[config.name])
            tokens_BTD = torch.randn(*shape, config.token_width, device=device)
            stream = Stream(tokens_BTD, torch.ones(shape, dtype=torch.bool, device=device))
        if config.pooled_width:
            stream.pooled_BD = torch.randn(batch_images, config.pooled_width, device=device)
        made[config.name] = stream
    return Conditioning(made, batch_images)


def rows(
    speeds: dict[str, Speed], image_flops: float, peak: PeakFlops, device: torch.device
) -> list[Row]:
    """Images per second against the first variant, and FLOP/s against the device's peak (MFU)."""
    versions = {
        "machine": _device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ediffi": _our_version(),
    }
    first_name, first = next(iter(speeds.items()))
    found = []
    for name, speed in speeds.items():
        measure = f"base U-Net, bf16, {name}, batch {speed.batch_images}"
        about: dict[str, Any] = {"better": "higher", "command": COMMAND, "versions": versions}
        rates = speed.images_per_s
        found.append(
            row(measure, "images/s", rates, first.images_per_s, other_name=first_name, **about)
        )
        tera_per_s = [rate * image_flops / TERA for rate in rates]
        peaks = [peak.flops_per_s / TERA] * len(rates)
        name = f"peak, {peak.source} (ratio: MFU)"
        found.append(row(measure, "TFLOP/s", tera_per_s, peaks, other_name=name, **about))
        mfu = statistics.median(tera_per_s) / peaks[0]
        print(f"{measure}: {statistics.median(rates):.4g} images/s, MFU {mfu:.3f}", file=sys.stderr)
    return found


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()


def _our_version() -> str:
    """From the checkout: the package is not installed where only torch is."""
    text = Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8")
    version: str = tomllib.loads(text)["project"]["version"]
    return version


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
