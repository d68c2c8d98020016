"""What is found in the drawings, as jobs: features, and distances from the held-out pictures.

Shape legend: N pictures, D features, R resamplings.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.claims.data import Row, read_emoji
from benchmarks.claims.drawing import Drawing
from benchmarks.claims.judges import SEED, features, read_pictures
from benchmarks.claims.results import Results
from ediffi.metrics import resampled_distance

NUM_RESAMPLES = 100


@dataclass(frozen=True, kw_only=True)
class Real:
    """Features of the held-out pictures, in the order of their list."""

    emoji: str

    def run(self, results: Results) -> dict[str, Tensor]:
        """Extract; float64 (N, D)."""
        folder = Path(self.emoji)
        return {"features": torch.from_numpy(features(read_pictures(folder, real_rows(folder))))}


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of a drawing that is done."""

    drawing: Drawing

    def run(self, results: Results) -> dict[str, Tensor]:
        """Extract; float64 (N, D)."""
        return {"features": torch.from_numpy(features(results[self.drawing]))}


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Fréchet distance of a drawing from the held-out pictures; both have their features."""

    drawing: Drawing
    emoji: str

    def run(self, results: Results) -> dict[str, Tensor]:
        """Measure; float64 (1 + R,): the value, then its replicates."""
        found = resampled_distance(
            results[Features(drawing=self.drawing)].numpy(),
            results[Real(emoji=self.emoji)].numpy(),
            kind="frechet",
            seed=SEED,
            num=NUM_RESAMPLES,
        )
        return {"distance": torch.tensor([found.value, *found.replicates_R])}


def real_rows(emoji: Path) -> list[Row]:
    """The held-out pictures."""
    return [row for row in read_emoji(emoji) if row["split"] == "test"]
