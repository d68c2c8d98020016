"""Pictures for docs/: what the models of the claims drew, side by side, none chosen by hand.

Shape legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.claims.control import STRENGTHS, Painting, Style
from benchmarks.claims.drawing import half_mask
from benchmarks.claims.ensembles import Experts
from benchmarks.claims.judges import PICTURE_PX, read_pictures
from benchmarks.claims.study import Study
from pipelines.grids import draw_grid
from pipelines.stages.evaluation.painting import masks_picture

NUM_ROWS = 9
EVERY_CAPTION = 45  # of the held-out ones: as far apart as they are many


def write_pictures(study: Study, directory: Path) -> None:
    """Write `claims-experts.png`, `claims-style.png` and `claims-painting.png`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, blocks in (
        ("experts", _experts(study)),
        ("style", _style(study)),
        ("painting", _painting(study)),
    ):
        prompts, pictures = blocks
        draw_grid(prompts, pictures).save(directory / f"claims-{name}.png")


def _experts(study: Study) -> tuple[list[str], dict[str, Tensor]]:
    """Held-out captions by the models of the first training seed."""
    num = len(study.real_rows)
    rows = list(range(0, num, EVERY_CAPTION))[:NUM_ROWS]
    real = read_pictures(study.emoji, [study.real_rows[row] for row in rows])
    blocks = {"held out": real[:, None]}
    claim = Experts(study)
    for name, models in claim.sides.items():
        drawn = study.results[claim.drawing(models[0])].unflatten(0, (-1, num))
        blocks[name] = drawn[:, rows].transpose(0, 1)
    return [study.captions[row] for row in rows], blocks


def _style(study: Study) -> tuple[list[str], dict[str, Tensor]]:
    """Captions without a style, each with a reference picture and without."""
    claim = Style(study)
    cases = claim.cases[:NUM_ROWS]
    references = read_pictures(study.emoji, [{"url": url} for *_, url in cases])
    blocks = {"reference": references[:, None]}
    for name, styled in (("with it", True), ("without", False)):
        (first, *_) = claim.drawn(styled=styled)
        blocks[name] = study.results[first][:NUM_ROWS, None]
    return [caption for caption, *_ in cases], blocks


def _painting(study: Study) -> tuple[list[str], dict[str, Tensor]]:
    """Captions with a painting, drawn at each strength."""
    claim = Painting(study)
    cases = claim.cases[:NUM_ROWS]
    blocks = {"painting": torch.stack([_painted(phrases) for _, phrases in cases])[:, None]}
    for strength in STRENGTHS:
        pictures = study.results[claim.drawing(strength)]
        blocks[f"strength {strength:g}"] = pictures[:NUM_ROWS, None]
    return [caption for caption, _ in cases], blocks


def _painted(phrases: tuple[tuple[str, str], ...]) -> Tensor:
    """Each phrase's half in its colour, uint8 (3, H, W)."""
    masks_PHW = torch.stack([half_mask(half, PICTURE_PX) for _, half in phrases])
    return masks_picture(masks_PHW.numpy(), [text for text, _ in phrases])
