"""The content that every side of `benchmarks.joined_read` stores in its own way, and reads back.

A sample is a 64 px picture, a caption and three caches of realistic size: T5 tokens, about 12 x
1024; CLIP text tokens, as many x 768, with a pooled vector; a pooled CLIP image vector; all bf16.
Pictures are the emoji drawings where they lie beside the checkout, else shapes drawn here.

Shape legend: B batch, C channels, H W pixels, T tokens, D width.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

PICTURES = Path(__file__).resolve().parents[2] / "shared" / "data" / "emoji" / "images"
IMAGE_PX = 64
BATCH_SAMPLES = 64
STREAMS = ("t5", "clip_text", "clip_image")


@dataclass(frozen=True, slots=True)
class JoinedSample:
    """What every side must give back, bit by bit."""

    key: str
    caption: str
    image_CHW: Tensor  # uint8
    t5_TD: Tensor  # bf16
    clip_text_TD: Tensor  # bf16
    clip_text_D: Tensor  # bf16
    clip_image_D: Tensor  # bf16


def content(num_samples: int) -> Iterator[tuple[JoinedSample, bytes]]:
    """Make the samples, each with its picture as PNG. The same ones every time."""
    pictures = sorted(PICTURES.rglob("*.png"))
    for index in range(num_samples):
        generator = torch.Generator().manual_seed(index)
        num_tokens = int(torch.randint(6, 19, (), generator=generator))

        def states(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator).bfloat16()

        picture = _flat(pictures[index % len(pictures)]) if pictures else _shape(index)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        sample = JoinedSample(
            key=f"{index:08d}",
            caption=f"an emoji, number {index} of {num_samples}",
            image_CHW=decode(buffer.getvalue()),
            t5_TD=states(num_tokens, 1024),
            clip_text_TD=states(num_tokens, 768),
            clip_text_D=states(768),
            clip_image_D=states(768),
        )
        yield sample, buffer.getvalue()


def _flat(path: Path) -> Image.Image:
    picture = Image.open(path).convert("RGBA").resize((IMAGE_PX, IMAGE_PX))
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def _shape(index: int) -> Image.Image:
    rng = np.random.default_rng(index)
    picture = Image.new("RGB", (IMAGE_PX, IMAGE_PX), "white")
    draw = ImageDraw.Draw(picture)
    for _ in range(4):
        x, y, radius = rng.integers(8, 56, 3)
        color = tuple(int(value) for value in rng.integers(0, 256, 3))
        draw.ellipse([x - radius // 3, y - radius // 3, x + radius // 3, y + radius // 3], color)
    return picture


def decode(png: bytes) -> Tensor:
    """The usual decoding of a picture: uint8 (C, H, W)."""
    return to_tensor(Image.open(io.BytesIO(png)).convert("RGB"))


def to_tensor(picture: Image.Image) -> Tensor:
    """A decoded picture as uint8 (C, H, W)."""
    return torch.from_numpy(np.array(picture).transpose(2, 0, 1).copy())


def collate(samples: Sequence[JoinedSample]) -> dict[str, Any]:
    """The batch that a training step takes; the same function for every side."""
    return {
        "keys": [sample.key for sample in samples],
        "captions": [sample.caption for sample in samples],
        "images_BCHW": torch.stack([sample.image_CHW for sample in samples]),
        "num_tokens_B": torch.tensor([len(sample.t5_TD) for sample in samples]),
        "t5_BTD": pad_sequence([sample.t5_TD for sample in samples], batch_first=True),
        "clip_text_BTD": pad_sequence(
            [sample.clip_text_TD for sample in samples], batch_first=True
        ),
        "clip_text_BD": torch.stack([sample.clip_text_D for sample in samples]),
        "clip_image_BD": torch.stack([sample.clip_image_D for sample in samples]),
    }


def measure(batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Read an epoch, from asking for the first batch to having the last."""
    started_s = time.perf_counter()
    num_samples = sum(len(batch["keys"]) for batch in batches)
    return {"samples_per_s": num_samples / (time.perf_counter() - started_s)}


def digest(batches: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Digest of an epoch's samples, whatever their order, and their number."""
    total, num_samples = 0, 0
    for batch in batches:
        for row, key in enumerate(batch["keys"]):
            num_tokens = int(batch["num_tokens_B"][row])
            tensors = [
                batch["images_BCHW"][row],
                batch["t5_BTD"][row, :num_tokens].contiguous().view(torch.uint8),
                batch["clip_text_BTD"][row, :num_tokens].contiguous().view(torch.uint8),
                batch["clip_text_BD"][row].view(torch.uint8),
                batch["clip_image_BD"][row].view(torch.uint8),
            ]
            text = f"{key}\n{batch['captions'][row]}\n".encode()
            data = text + b"".join(tensor.numpy().tobytes() for tensor in tensors)
            total ^= int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
            num_samples += 1
    return {"digest": f"{total:016x}", "num_samples": num_samples}
