"""The claims on control: style by a reference picture, places by painting with words.

Shape legend: B batch, H W pixels, N pictures.
"""

from __future__ import annotations

import random
from functools import cached_property

import numpy as np

from benchmarks.claims.data import STYLES, colour_of, is_styled, read_list
from benchmarks.claims.drawing import HALVES, Drawing, Model, half_mask, held_out
from benchmarks.claims.judges import (
    PICTURE_PX,
    Floats,
    colour_masks,
    mean,
    read_pictures,
    told,
)
from benchmarks.claims.results import Job
from benchmarks.claims.study import Answer, Claim, Comparison, Table
from benchmarks.claims.style_judge import StyleJudge, agreement

STYLE_PICTURES = 240
PAINTED_PICTURES = 192
STRENGTHS = (0.0, 0.1, 0.3, 1.0, 3.0)
MIN_PIXELS = 6  # of the phrase's colour, below which a picture does not show it


class Style(Claim):
    """The CLIP embedding of a picture sets the drawing style; the caption does not name one."""

    def drawn(self, *, styled: bool) -> list[Drawing]:
        """One a training seed, with reference pictures or without."""
        prompts, _, references = zip(*self.cases, strict=True)
        styles = tuple(str(self.study.emoji / one) for one in references) if styled else ()
        return [
            Drawing(model=Model(ensemble=str(one)), prompts=prompts, styles=styles)
            for one in self.study.models.experts
        ]

    @cached_property
    def cases(self) -> list[tuple[str, str, str]]:
        """(caption without style, style, reference picture of another emoji), all held out."""
        chance = random.Random(0)
        captions = sorted(
            {row["caption"] for row in held_out(self.study.singles) if not is_styled(row)}
        )
        cases = []
        for index in range(STYLE_PICTURES):
            style, caption = list(STYLES)[index % len(STYLES)], captions[index % len(captions)]
            others = [
                r
                for r in self.study.real_rows
                if r["style"] == style and r["caption"] not in caption
            ]
            cases.append((caption, style, chance.choice(others)["url"]))
        return cases

    def drawings(self) -> list[Drawing]:
        return [*self.drawn(styled=True), *self.drawn(styled=False)]

    @property
    def judge(self) -> StyleJudge:
        """Knows the three styles."""
        return StyleJudge(emoji=str(self.study.emoji))

    def judgements(self) -> list[Job]:
        return [self.judge]

    def answer(self) -> Answer:
        results, rows_of_real = self.study.results, self.study.real_rows
        wanted = [style for _, style, _ in self.cases]
        real = self.judge.judge(results, read_pictures(self.study.emoji, rows_of_real))
        on_real = agreement(real, [row["style"] for row in rows_of_real])
        with_reference, without = (
            [
                agreement(self.judge.judge(results, results[one]), wanted)
                for one in self.drawn(styled=styled)
            ]
            for styled in (True, False)
        )
        rows: list[tuple[object, ...]] = [("held-out pictures themselves", told(mean(on_real)))]
        rows += [
            ("with a reference picture", told(mean(np.mean(with_reference, axis=0)))),
            ("without", told(mean(np.mean(without, axis=0)))),
        ]
        for style, word in STYLES.items():
            chosen = np.array([one == style for one in wanted])
            rows.append(
                (
                    f"with a reference, {word}",
                    told(mean(np.mean(with_reference, axis=0)[chosen])),
                )
            )
        comparison = Comparison(
            measure="Style: agreement of the classifier",
            ours=[float(np.mean(one)) for one in with_reference],
            other=[float(np.mean(one)) for one in without],
            other_name="no reference",
            better="higher",
        )
        return Answer(
            [
                Table(
                    "Style by a reference picture (chance 1/3)",
                    ("", "share of the wanted style"),
                    rows,
                )
            ],
            [comparison],
        )


class Painting(Claim):
    """Painting says where a phrase is."""

    @cached_property
    def cases(self) -> list[tuple[str, tuple[tuple[str, str], ...]]]:
        """(caption, its two phrases each with its half); combinations that training never saw."""
        rows = read_list(self.study.folder / "pairs" / "list.parquet")
        captions = sorted({row["caption"] for row in rows if row["split"] == "test"})
        cases: list[tuple[str, tuple[tuple[str, str], ...]]] = []
        for index in range(PAINTED_PICTURES):
            caption = captions[index % len(captions)]
            one, other = caption.split(" and ")
            halves = HALVES[:2] if index // 2 % 2 else HALVES[2:]
            halves = halves if index % 2 else halves[::-1]
            cases.append((caption, ((one, halves[0]), (other, halves[1]))))
        return cases

    def drawing(self, strength: float) -> Drawing:
        """All cases, painted that strongly."""
        prompts, paintings = zip(*self.cases, strict=True)
        return Drawing(
            model=Model(ensemble=str(self.study.models.pairs), part="base"),
            prompts=prompts,
            paintings=paintings,
            strength=strength,
        )

    def drawings(self) -> list[Drawing]:
        return [self.drawing(strength) for strength in STRENGTHS]

    def answer(self) -> Answer:
        inside = {strength: self._inside(strength) for strength in STRENGTHS}
        rows = [
            (
                f"{strength:g}",
                told(mean(share_N[~np.isnan(share_N)])),
                f"{(~np.isnan(share_N)).mean():.2f}",
            )
            for strength, share_N in inside.items()
        ]
        best = max(STRENGTHS, key=lambda strength: float(np.nanmean(inside[strength])))
        comparison = Comparison(
            measure=f"Painting at strength {best:g}: share of the phrase's pixels inside",
            ours=[float(np.nanmean(inside[best]))],
            other=[float(np.nanmean(inside[0.0]))],
            other_name="strength 0",
            better="higher",
        )
        header = (
            "strength",
            "share of the phrase's pixels inside its half",
            "phrases that are shown",
        )
        return Answer([Table("Painting with words (chance 1/2)", header, rows)], [comparison])

    def _inside(self, strength: float) -> Floats:
        """Of each phrase of each picture; NaN where its colour is not to be seen: (2 N,)."""
        pictures = self.study.results[self.drawing(strength)]
        shares = []
        for which in (0, 1):
            phrases = [phrases[which] for _, phrases in self.cases]
            masks_BHW = colour_masks(pictures, [colour_of(text) for text, _ in phrases])
            for mask_HW, (_, half) in zip(masks_BHW, phrases, strict=True):
                num = int(mask_HW.sum())
                inside = int((mask_HW & half_mask(half, PICTURE_PX)).sum())
                shares.append(inside / num if num >= MIN_PIXELS else np.nan)
        return np.array(shares)
