"""What the models of the claims draw and lose, as jobs.

Shape legend: B batch, C channels, H W pixels, K noise bins, N pictures.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import ediffi
from benchmarks.claims.data import LIST_NAME, Row, read_list
from benchmarks.claims.judges import PICTURE_PX, read_pictures
from benchmarks.claims.results import SAMPLING, Results
from ediffi.ensemble import Blend
from ediffi.generator import Generator
from ediffi.loss import denoising_loss, paired_draws
from ediffi.noise import NoiseInterval
from ediffi.painting import Painting, Phrase
from ediffi.train.data import to_unit_range

# Edges at the experts' own seams (quantiles 0.25 and 0.9 of the recipe's noise) and around them.
SIGMA_EDGES = (0.0, 0.05, 0.236, 0.6, 1.56, 3.648, 9.6, 27.0, 60.0, 120.0)
HALVES = ("left", "right", "top", "bottom")
_BATCH_PICTURES = 32
_SEED = 0

Part = Literal["ensemble", "base"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """One denoiser to be judged."""

    ensemble: str  # its directory
    part: Part = "ensemble"
    blend: Literal["route", "average"] = "route"
    dropped_streams: tuple[str, ...] = ()

    def load(self) -> Generator:
        """Open the ensemble, weights in fp32, the network in bf16 as it was trained."""
        return ediffi.load(self.ensemble, blend=Blend(kind=self.blend), precision="bf16")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Pictures that one model draws; picture i starts from noise of seed i."""

    model: Model
    prompts: tuple[str, ...]
    styles: tuple[str, ...] = ()  # paths of reference pictures, one a prompt; empty: none
    paintings: tuple[tuple[tuple[str, str], ...], ...] = ()  # of each prompt: (phrase, half)
    strength: float = 0.0  # of the phrases

    def run(self, results: Results) -> dict[str, Tensor]:
        """Draw; uint8 (B, 3, H, W)."""
        pictures = self.model.load().draw(
            self.prompts,
            seeds=range(len(self.prompts)),
            style=list(self.styles) or None,
            painting=[self._painting(one) for one in self.paintings] or None,
            dropped_streams=self.model.dropped_streams,
            model=self.model.part,
            config=SAMPLING,
        )
        return {"pictures": pictures}

    def _painting(self, phrases: tuple[tuple[str, str], ...]) -> Painting:
        return Painting(
            tuple(
                Phrase(
                    text=text, mask_HW=half_mask(half, PICTURE_PX).float(), strength=self.strength
                )
                for text, half in phrases
            )
        )


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Losses of one model on held-out pictures, by noise bin, on draws that all models share."""

    model: Model
    singles: str  # folder of the data set

    def run(self, results: Results) -> dict[str, Tensor]:
        """Measure; float32 (K, N)."""
        generator, rows = self.model.load(), held_out(Path(self.singles))
        pictures = to_unit_range(read_pictures(Path(self.singles), rows))
        columns = []
        for start in range(0, len(rows), _BATCH_PICTURES):
            part = slice(start, start + _BATCH_PICTURES)
            columns.append(self._losses(generator, rows[part], pictures[part], start))
        return {"losses": torch.cat(columns, dim=1)}

    @torch.no_grad()
    def _losses(
        self, generator: Generator, rows: Sequence[Row], x_BCHW: Tensor, first: int
    ) -> Tensor:
        conditioning = generator.conditioning([row["caption"] for row in rows])
        conditioning = conditioning.without(self.model.dropped_streams)
        indices = range(first, first + len(rows))
        losses = []
        for number, (low, high) in enumerate(itertools.pairwise(SIGMA_EDGES)):
            sigma_B, noise_BCHW = paired_draws(
                generator.info.distribution,
                NoiseInterval(low, high),
                x_BCHW.shape[1:],
                _SEED,
                indices,
                number,
            )
            denoiser, coefficients = (
                generator.denoiser(self.model.part),
                generator.info.preconditioning,
            )
            losses.append(
                denoising_loss(
                    denoiser,
                    x_BCHW,
                    sigma_B,
                    noise_BCHW,
                    conditioning.to(dtype=torch.float32),
                    coefficients,
                )
            )
        return torch.stack(losses).float()


def half_mask(half: str, side_px: int) -> Tensor:
    """One half of a square picture, bool (H, W)."""
    mask = torch.zeros(side_px, side_px, dtype=torch.bool)
    middle = side_px // 2
    cut = slice(0, middle) if half in ("left", "top") else slice(middle, None)
    if half in ("left", "right"):
        mask[:, cut] = True
    else:
        mask[cut] = True
    return mask


def held_out(singles: Path) -> list[Row]:
    """Held-out pictures, each with its two captions."""
    return [row for row in read_list(singles / LIST_NAME) if row["split"] == "test"]
