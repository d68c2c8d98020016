"""The claims on ensembles and on text, judged on the held-out captions.

Shape legend: K noise bins, N pictures.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.claims.drawing import SIGMA_EDGES, Drawing, Model
from benchmarks.claims.judges import mean, told
from benchmarks.claims.judging import Features
from benchmarks.claims.results import Job
from benchmarks.claims.study import Answer, Claim, Comparison, Table
from ediffi.metrics import Resampled

Sides = Mapping[str, Sequence[Model]]  # name -> one model a training seed


class Comparing(Claim):
    """Several models of the same captions and the same noise."""

    pictures_per_caption = 1

    @property
    @abstractmethod
    def sides(self) -> Sides:
        """What is compared."""

    def drawing(self, model: Model) -> Drawing:
        """The held-out captions, each as often as the claim has it drawn."""
        return Drawing(model=model, prompts=self.study.captions * self.pictures_per_caption)

    def drawings(self) -> list[Drawing]:
        return [self.drawing(one) for one in self._models]

    def looks(self) -> list[Job]:
        return [
            self.study.real_features,
            *(Features(drawing=one) for one in self.drawings()),
        ]

    def judgements(self) -> list[Job]:
        return [
            *(self.study.losses(one) for one in self._models),
            *(self.study.distance_job(self.drawing(one)) for one in self._models),
        ]

    @property
    def _models(self) -> list[Model]:
        return [model for side in self.sides.values() for model in side]

    def _compare(self, title: str, first: str, other: str) -> Answer:
        """Fréchet distance, likeness and loss of all sides; the difference of two of them."""
        study, sides = self.study, self.sides
        drawn = {name: [self.drawing(one) for one in models] for name, models in sides.items()}
        rows: list[Sequence[object]] = [
            (
                name,
                told(study.mean_distance(drawings), 1),
                told(mean(np.mean([study.likeness(one) for one in drawings], axis=0))),
                f"{study.mean_loss(sides[name]):.4f}",
            )
            for name, drawings in drawn.items()
        ]
        difference = study.mean_distance(drawn[first]) - study.mean_distance(drawn[other])
        rows.append((f"{first} less {other}", told(difference, 1), "", ""))
        header = (
            "",
            "Fréchet distance",
            "likeness to the caption's own picture",
            "loss, mean of bins",
        )
        comparison = Comparison(
            measure=f"{title}: Fréchet distance",
            ours=[study.distance(one).value for one in drawn[first]],
            other=[study.distance(one).value for one in drawn[other]],
            other_name=other,
            better="lower",
        )
        return Answer([Table(title, header, rows)], [comparison])


class Experts(Comparing):
    """Experts are better than the base trained on for as long, at equal sampling cost."""

    pictures_per_caption = 2

    @property
    def sides(self) -> Sides:
        models = self.study.models
        return {
            "base": [Model(ensemble=str(one), part="base") for one in models.experts],
            "base, trained on": [Model(ensemble=str(one)) for one in models.continued],
            "three experts": [Model(ensemble=str(one)) for one in models.experts],
        }

    def answer(self) -> Answer:
        answer = self._compare("Experts", "three experts", "base, trained on")
        return Answer([*answer.tables, self._loss_table(), self._seed_table()], answer.comparisons)

    def _loss_table(self) -> Table:
        losses = {
            name: np.mean(
                [self.study.results[self.study.losses(one)].double().numpy() for one in side],
                axis=0,
            )
            for name, side in self.sides.items()
        }  # (K, N), the mean over training seeds
        rows = []
        for index, (low, high) in enumerate(itertools.pairwise(SIGMA_EDGES)):
            experts, other = mean(losses["three experts"][index]), losses["base, trained on"][index]
            means = [f"{one[index].mean():.4f}" for one in losses.values()]
            change = _percent(experts, mean(other))
            rows.append((f"{low:g} to {high:g}", *means, told(change, 1)))
        return Table(
            "Loss by noise level", ("sigma", *losses, "experts against trained on, %"), rows
        )

    def _seed_table(self) -> Table:
        study = self.study
        rows = []
        for name, side in self.sides.items():
            distances = [study.distance(self.drawing(one)).value for one in side]
            rows.append((name, *(f"{one:.1f}" for one in distances)))
        num_seeds = len(study.models.experts)
        return Table("Fréchet distance by training seed", ("", *map(str, range(num_seeds))), rows)


def _percent(ours: Resampled, other: Resampled) -> Resampled:
    """How much ours is above the other."""
    return Resampled(
        100 * (ours.value / other.value - 1), 100 * (ours.replicates_R / other.replicates_R - 1)
    )


class Text(Comparing):
    """Both text encoders are better than either."""

    @property
    def sides(self) -> Sides:
        def dropped(*streams: str) -> list[Model]:
            return [
                Model(ensemble=str(one), dropped_streams=streams)
                for one in self.study.models.experts
            ]

        return {
            "both": dropped(),
            "T5's place (MiniLM) alone": dropped("clip_text"),
            "CLIP text alone": dropped("t5"),
        }

    def answer(self) -> Answer:
        return self._compare("Text encoders", "both", "T5's place (MiniLM) alone")


class Routing(Comparing):
    """One expert a call is better than a weighted average of all."""

    @property
    def sides(self) -> Sides:
        experts = self.study.models.experts
        return {
            "routing": [Model(ensemble=str(one)) for one in experts],
            "weighted average, alpha 0.9": [
                Model(ensemble=str(one), blend="average") for one in experts
            ],
        }

    def answer(self) -> Answer:
        return self._compare("Routing", "routing", "weighted average, alpha 0.9")
