"""What the claims share: models, held-out pictures, results, and how two models are compared.

Shape legend: N pictures, D features, R held-out pictures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.claims.data import Row, is_styled
from benchmarks.claims.drawing import Drawing, Losses, Model, held_out
from benchmarks.claims.judges import Floats, average
from benchmarks.claims.judging import Distance, Features, Real, real_rows
from benchmarks.claims.models import Models
from benchmarks.claims.results import Job, Results
from ediffi.metrics import Resampled


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

    @property
    def singles(self) -> Path:
        """Folder of the data set of single pictures."""
        return self.folder / "singles"

    @property
    def real_features(self) -> Real:
        """The job that looks at the held-out pictures."""
        return Real(emoji=str(self.emoji))

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """Held-out captions that name the style, in the order of the held-out pictures."""
        return tuple(row["caption"] for row in held_out(self.singles) if is_styled(row))

    @cached_property
    def real_rows(self) -> list[Row]:
        """The held-out pictures."""
        return real_rows(self.emoji)

    @cached_property
    def real(self) -> Floats:
        """Features of the held-out pictures."""
        return self.results[self.real_features].numpy()

    def losses(self, model: Model) -> Losses:
        """The job that measures a model's loss."""
        return Losses(model=model, singles=str(self.singles))

    def mean_loss(self, models: Sequence[Model]) -> float:
        """Over noise bins, pictures and training seeds."""
        return float(np.mean([self.results[self.losses(one)].mean().item() for one in models]))

    def features_of(self, drawing: Drawing) -> Floats:
        """Features of a drawing (N, D)."""
        return self.results[Features(drawing=drawing)].numpy()

    def distance_job(self, drawing: Drawing) -> Distance:
        """The job that measures a drawing's distance from the held-out pictures."""
        return Distance(drawing=drawing, emoji=str(self.emoji))

    def distance(self, drawing: Drawing) -> Resampled:
        """Fréchet distance from the held-out pictures; drawings of equal captions are paired."""
        value, *replicates = self.results[self.distance_job(drawing)].tolist()
        return Resampled(value, np.array(replicates))

    def mean_distance(self, drawings: Sequence[Drawing]) -> Resampled:
        """The mean over training seeds."""
        return average([self.distance(one) for one in drawings])

    def likeness(self, drawing: Drawing) -> Floats:
        """Share of the held-out pictures that are less like a drawing than its own caption's: (N,).

        One half is chance. By cosine of features; a judge that never saw a caption.
        """
        mean_D = self.real.mean(0)
        drawn_ND, real_RD = _unit(self.features_of(drawing) - mean_D), _unit(self.real - mean_D)
        cosine_NR = drawn_ND @ real_RD.T
        own_N = np.arange(len(drawn_ND)) % len(real_RD)
        return (cosine_NR < cosine_NR[np.arange(len(drawn_ND)), own_N][:, None]).mean(1)


def _unit(x_ND: Floats) -> Floats:
    return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)


class Claim(ABC):
    """One claim of the paper."""

    def __init__(self, study: Study) -> None:
        self.study = study

    @abstractmethod
    def drawings(self) -> list[Drawing]:
        """What must be drawn for it."""

    def looks(self) -> list[Job]:
        """Features that it needs, once the drawings are there."""
        return []

    def judgements(self) -> list[Job]:
        """What must be measured besides, once features are there."""
        return []

    @abstractmethod
    def answer(self) -> Answer:
        """What the finished jobs come to."""


def finish(claims: Sequence[Claim], results: Results, tell: Callable[[str], None]) -> None:
    """Do all jobs of some claims: draw, look at the drawings, measure."""
    results.make([one for claim in claims for one in claim.drawings()], tell)
    results.make([one for claim in claims for one in claim.looks()], tell)
    results.make([one for claim in claims for one in claim.judgements()], tell)
