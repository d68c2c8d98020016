"""Text to pictures: an ensemble directory, its encoders and a sampler behind one call.

    generator = ediffi.load("ediffi-store/assemble/.../ensemble")
    pictures = generator.generate(["a red circle on the left"], seeds=[0, 1])

Shape legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ediffi.conditioning import Conditioning, collate
from ediffi.encoders import load_encoder
from ediffi.encoding.encoder_weights import EncoderConfig
from ediffi.ensemble import EnsembleInfo, load_base, load_ensemble
from ediffi.guidance import guided
from ediffi.preconditioning import DenoiserFn
from ediffi.samplers import SAMPLERS, initial_noise
from ediffi.schedule import sigma_schedule

Model = Literal["ensemble", "base"]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How noise becomes a picture. The defaults are EDM's grid and a mild guidance."""

    sampler: Literal["heun", "dpm++2m"] = "heun"
    num_steps: int = 18
    guidance: float = 2.0  # 1: conditional only
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    batch_pictures: int = 64

    def __post_init__(self) -> None:
        """Raise ValueError for a sampler that does not exist or an empty batch."""
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}")
        if self.batch_pictures < 1:
            raise ValueError(f"batch_pictures must be at least 1, got {self.batch_pictures}")


class Generator:
    """A loaded ensemble that turns prompts into pictures.

    Args:
        directory: an ensemble directory, as `save_ensemble` writes it. Weights of encoders that
            begin with `./` lie inside it.
        device: where the network runs.

    Raises:
        SnapshotError: the directory is incomplete or damaged; the message names the file.
    """

    def __init__(self, directory: Path, *, device: str = "cpu") -> None:
        self.directory, self.device = directory, device
        self.info: EnsembleInfo
        self.info, ensemble = load_ensemble(directory)
        self.ensemble = ensemble.to(device)
        self._base: DenoiserFn | None = None

    def denoiser(self, model: Model = "ensemble") -> DenoiserFn:
        """The ensemble, or the base that its experts come from."""
        if model == "ensemble":
            return self.ensemble
        if self._base is None:
            self._base = load_base(self.directory).to(self.device)
        return self._base

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts with the ensemble's own text encoders; image streams stay null."""
        samples: list[dict[str, dict[str, Tensor]]] = [{} for _ in prompts]
        for name, description in self.info.encoders.items():
            encoder = load_encoder(self._encoder_config(description), device=self.device)
            if encoder.kind == "text":
                for sample, tensors in zip(samples, encoder.encode(list(prompts)), strict=True):
                    sample[name] = tensors
        return collate(samples, self.info.network.streams)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        config: SamplingConfig | None = None,
        model: Model = "ensemble",
        progress: Callable[[int], None] = lambda num_pictures: None,
    ) -> Tensor:
        """Draw one picture a prompt.

        Args:
            prompts: what to draw.
            seeds: one a prompt; a picture depends on its prompt and its seed, on nothing else
                in the batch beyond rounding.
            progress: told the number of finished pictures after every batch.

        Returns:
            uint8 (B, 3, H, W).

        Raises:
            ValueError: numbers of prompts and seeds differ.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"seeds must be one a prompt ({len(prompts)}), got {len(seeds)}")
        config = config or SamplingConfig()
        batches = []
        for start in range(0, len(prompts), config.batch_pictures):
            part = slice(start, start + config.batch_pictures)
            batches.append(self._draw(prompts[part], seeds[part], config, model))
            progress(start + len(batches[-1]))
        return torch.cat(batches)

    def _draw(
        self, prompts: Sequence[str], seeds: Sequence[int], config: SamplingConfig, model: Model
    ) -> Tensor:
        network = self.info.network
        shape = (network.image_channels, network.image_px, network.image_px)
        x_BCHW = initial_noise(seeds, shape, config.sigma_max).to(self.device)
        sigmas = sigma_schedule(
            config.num_steps,
            sigma_min=config.sigma_min,
            sigma_max=config.sigma_max,
            rho=config.rho,
        )
        conditioning = self.conditioning(prompts).to(self.device, torch.float32)
        denoiser = guided(self.denoiser(model), config.guidance)
        return to_uint8(SAMPLERS[config.sampler](denoiser, x_BCHW, sigmas, conditioning, None))

    def _encoder_config(self, description: dict[str, object]) -> EncoderConfig:
        weights = str(description["weights"])
        if weights.startswith("./"):
            description = {**description, "weights": str(self.directory / weights)}
        return EncoderConfig(**description)  # type: ignore[arg-type]


def to_uint8(pictures_BCHW: Tensor) -> Tensor:
    """Pictures in [-1, 1] (clipped) as uint8 on the CPU."""
    return ((pictures_BCHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
