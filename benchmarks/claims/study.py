"""What the claims share: models, held-out pictures, results, and how two models are compared.

Shape legend: N pictures, D features, R held-out pictures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.claims.data import Row, is_styled, read_emoji
from benchmarks.claims.drawing import Drawing, Job, Losses, Model, Results, held_out
from benchmarks.claims.judges import SEED, Floats, average, features, read_pictures
from benchmarks.claims.models import Models
from ediffi.metrics import Resampled, resampled_distance

PICTURES_PER_CAPTION = 2
NUM_RESAMPLES = 200


@dataclass(frozen=True)
class Table:
    """A result for people: a caption, a header and rows of cells."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    def markdown(self) -> str:
        """The table under its title."""
        lines = [
            "| " + " | ".join(self.header) + " |",
            "|---" + "|--:" * (len(self.header) - 1) + "|",
        ]
        lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in self.rows]
        return f"**{self.title}**\n\n" + "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One figure of two sides, one value a run or a training seed."""

    measure: str
    ours: Sequence[float]
    other: Sequence[float]
    other_name: str
    better: Literal["higher", "lower"]
    unit: str = "–"


@dataclass(frozen=True)
class Answer:
    """What one claim comes to."""

    tables: Sequence[Table]
    comparisons: Sequence[Comparison]


@dataclass(frozen=True)
class Study:
    """Models, data and results that the claims share."""

    models: Models
    folder: Path
    emoji: Path
    results: Results
    _features: dict[Job, Floats] = field(default_factory=dict)
    _distances: dict[Drawing, Resampled] = field(default_factory=dict)

    @property
    def singles(self) -> Path:
        return self.folder / "singles"

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """Held-out captions that name the style, each as often as it is drawn."""
        captions = [row["caption"] for row in held_out(self.singles) if is_styled(row)]
        return tuple(captions * PICTURES_PER_CAPTION)

    @cached_property
    def real_rows(self) -> list[Row]:
        return [row for row in read_emoji(self.emoji) if row["split"] == "test"]

    @cached_property
    def real(self) -> Floats:
        """Features of the held-out pictures, in the order of the captions."""
        return features(read_pictures(self.emoji, self.real_rows))

    def drawing(self, model: Model) -> Drawing:
        """The held-out captions, drawn by a model."""
        return Drawing(model=model, prompts=self.captions)

    def losses(self, model: Model) -> Losses:
        return Losses(model=model, singles=str(self.singles))

    def mean_loss(self, models: Sequence[Model]) -> float:
        """Over noise bins, pictures and training seeds."""
        return float(np.mean([self.results[self.losses(one)].mean().item() for one in models]))

    def features_of(self, drawing: Drawing) -> Floats:
        if drawing not in self._features:
            self._features[drawing] = features(self.results[drawing])
        return self._features[drawing]

    def distance(self, drawing: Drawing) -> Resampled:
        """Fréchet distance to the held-out pictures; drawings of equal captions are paired."""
        if drawing not in self._distances:
            self._distances[drawing] = resampled_distance(
                self.features_of(drawing), self.real, kind="frechet", seed=SEED, num=NUM_RESAMPLES
            )
        return self._distances[drawing]

    def mean_distance(self, drawings: Sequence[Drawing]) -> Resampled:
        """The mean over training seeds."""
        return average([self.distance(one) for one in drawings])

    def likeness(self, drawing: Drawing) -> Floats:
        """Share of the held-out pictures that are less like a drawing than its own caption's: (N,).

        One half is chance. By cosine of features; a judge that never saw a caption.
        """
        drawn, real = (
            _unit(self.features_of(drawing) - self.real.mean(0)),
            _unit(self.real - self.real.mean(0)),
        )
        cosine_NR = drawn @ real.T
        own = np.arange(len(drawn)) % len(real)
        return (cosine_NR < cosine_NR[np.arange(len(drawn)), own][:, None]).mean(1)


def _unit(x_ND: Floats) -> Floats:
    return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)


class Claim(ABC):
    """One claim of the paper."""

    def __init__(self, study: Study) -> None:
        self.study = study

    @abstractmethod
    def jobs(self) -> list[Job]:
        """What must be drawn and measured for it."""

    @abstractmethod
    def answer(self) -> Answer:
        """What the finished jobs come to."""
