"""Reads colour, shape and position back from pictures of the demo, to score text alignment.

A picture is white minus coverage times the colour's contrast (white - colour), so the contrast of
every pixel, antialiased edges included, points in the direction of the colour. The reading follows:
colour by direction, coverage by projecting on it, position by the centroid of coverage, shape by
the template that fits coverage best. Nothing is learned, so no model is flattered by its teacher.

Shape suffixes: N pictures, C channels, H height, W width. Pictures are uint8 (3, H, W), H = W.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.demo.shapes import (
    COLOURS,
    COMBINATIONS,
    POSITIONS,
    RADIUS_FRACTION,
    SHAPES,
    WHITE,
    Combination,
    coverage,
)

FAINTEST_COVERAGE = 0.2  # less than this is noise on the background, not a shape
MOST_MISFIT = 0.3  # of the squared contrast; a picture explained less shows nothing of the set
SIZE_TOLERANCE = 2.0  # factor by which the area may leave what the data set draws
GREY = (127, 127, 127)  # what is nearer to grey than to every colour has no colour
TEMPLATE_SCALES = (0.9, 1.0, 1.1)  # around the radius that the covered area implies

_CAPTIONS = {combination.caption: combination for combination in COMBINATIONS}


@dataclass(frozen=True, kw_only=True)
class AlignmentReport:
    """What of the captions the pictures show; tuples hold one entry per picture, in order.

    The tuples are what a bootstrap draws from; the fractions are their means.
    """

    colour_right: tuple[bool, ...]
    shape_right: tuple[bool, ...]
    position_right: tuple[bool, ...]

    @property
    def all_right(self) -> tuple[bool, ...]:
        """Per picture: colour, shape and position are all right."""
        rows = zip(self.colour_right, self.shape_right, self.position_right, strict=True)
        return tuple(all(row) for row in rows)

    @property
    def colour_fraction(self) -> float:
        return _mean(self.colour_right)

    @property
    def shape_fraction(self) -> float:
        return _mean(self.shape_right)

    @property
    def position_fraction(self) -> float:
        return _mean(self.position_right)

    @property
    def all_fraction(self) -> float:
        return _mean(self.all_right)

    @property
    def chance_fraction(self) -> float:
        """``all_fraction`` expected of pictures of the set drawn without regard to the captions."""
        return 1 / len(COMBINATIONS)


def _mean(right: Sequence[bool]) -> float:
    return sum(right) / len(right)


def parse_caption(caption: str) -> Combination:
    """The combination that ``caption`` names. Raises ValueError unless the data set writes it."""
    if caption not in _CAPTIONS:
        raise ValueError(
            f"caption must read like {COMBINATIONS[0].caption!r}, with a colour of "
            f"{', '.join(COLOURS)}, a shape of {', '.join(SHAPES)} and a position of "
            f"{', '.join(POSITIONS)}; got {caption!r}."
        )
    return _CAPTIONS[caption]


def score_alignment(pictures_NCHW: np.ndarray, captions: Sequence[str]) -> AlignmentReport:
    """Score every picture, uint8 (N, 3, H, W), against its caption.

    A picture that shows no shape of the set is wrong in everything.
    Raises ValueError for other arrays, no pictures, unequal lengths, or a caption not of the set.
    """
    if len(pictures_NCHW) != len(captions) or not captions:
        raise ValueError(
            "pictures and captions must be equally many, at least one; "
            f"got {len(pictures_NCHW)} pictures and {len(captions)} captions."
        )
    wanted = [parse_caption(caption) for caption in captions]
    seen = [detect(picture_CHW) for picture_CHW in pictures_NCHW]
    pairs = list(zip(wanted, seen, strict=True))
    return AlignmentReport(
        colour_right=tuple(s is not None and s.colour == w.colour for w, s in pairs),
        shape_right=tuple(s is not None and s.shape == w.shape for w, s in pairs),
        position_right=tuple(s is not None and s.position == w.position for w, s in pairs),
    )


def detect(picture_CHW: np.ndarray) -> Combination | None:
    """Read one picture, uint8 (3, H, W) with H = W; None when it shows no shape of the set.

    Raises ValueError for any other array.
    """
    _require_picture(picture_CHW)
    contrast_HWC = WHITE - picture_CHW.transpose(1, 2, 0).astype(np.float32)
    colour = _nearest_colour(contrast_HWC)
    if colour is None:
        return None
    coverage_HW = _unmix(contrast_HWC, colour)
    smallest, largest = _drawn_areas()
    if not smallest / SIZE_TOLERANCE <= coverage_HW.mean() <= largest * SIZE_TOLERANCE:
        return None
    centre = _centroid(coverage_HW)
    shape, template_HW = _best_template(coverage_HW, centre)
    unexplained_HWC = contrast_HWC - template_HW[..., None] * _contrast_C(COLOURS[colour])
    if np.square(unexplained_HWC).sum() > MOST_MISFIT * np.square(contrast_HWC).sum():
        return None
    position = min(POSITIONS, key=lambda name: math.dist(POSITIONS[name], centre))
    return Combination(colour=colour, shape=shape, position=position)


def _require_picture(picture_CHW: np.ndarray) -> None:
    shape = picture_CHW.shape
    if picture_CHW.dtype != np.uint8 or len(shape) != 3 or shape[0] != 3 or shape[1] != shape[2]:
        raise ValueError(
            f"picture must be uint8 (3, H, W) with H = W; got {picture_CHW.dtype} {shape}. "
            "Move channels first, and scale [-1, 1] to [0, 255]."
        )


def _contrast_C(rgb: tuple[int, int, int]) -> np.ndarray:
    return WHITE - np.asarray(rgb, dtype=np.float32)


def _nearest_colour(contrast_HWC: np.ndarray) -> str | None:
    """The colour nearest in direction to the picture's contrast; None when grey is nearer."""
    strength_HW1 = np.linalg.norm(contrast_HWC, axis=-1, keepdims=True)
    direction_C = (strength_HW1 * contrast_HWC).sum(axis=(0, 1))  # strong pixels outweigh noise

    def alignment(rgb: tuple[int, int, int]) -> float:
        return float(direction_C @ _contrast_C(rgb) / np.linalg.norm(_contrast_C(rgb)))

    colour = max(COLOURS, key=lambda name: alignment(COLOURS[name]))
    return colour if alignment(COLOURS[colour]) > alignment(GREY) else None


def _unmix(contrast_HWC: np.ndarray, colour: str) -> np.ndarray:
    """How much of ``colour`` every pixel holds: (H, W) in [0, 1]."""
    contrast_C = _contrast_C(COLOURS[colour])
    coverage_HW = np.clip(contrast_HWC @ contrast_C / (contrast_C @ contrast_C), 0, 1)
    return np.where(coverage_HW < FAINTEST_COVERAGE, 0, coverage_HW)


def _centroid(coverage_HW: np.ndarray) -> tuple[float, float]:
    """Centre of mass (x, y) as fractions of the picture's side."""
    middles = (np.arange(len(coverage_HW)) + 0.5) / len(coverage_HW)
    mass = coverage_HW.sum()
    return float(coverage_HW.sum(0) @ middles / mass), float(coverage_HW.sum(1) @ middles / mass)


@functools.cache
def _unit_area(shape: str) -> float:
    """Area of ``shape`` at radius 1."""
    radius = 0.25
    return float(coverage(shape, centre=(0.5, 0.5), radius=radius, image_px=64).mean()) / radius**2


@functools.cache
def _drawn_areas() -> tuple[float, float]:
    """The least and the greatest fraction of a picture that the data set covers."""
    areas = [_unit_area(shape) for shape in SHAPES]
    return min(areas) * RADIUS_FRACTION[0] ** 2, max(areas) * RADIUS_FRACTION[1] ** 2


def _best_template(coverage_HW: np.ndarray, centre: tuple[float, float]) -> tuple[str, np.ndarray]:
    """The shape, and its template (H, W), nearest to ``coverage_HW`` in squared error.

    Templates are tried at a few sizes around the one that gives the same area, crisp and softened:
    a model's soft circle must be compared with a soft square, or it reads as a square.
    """

    def templates(shape: str, scale: float) -> tuple[np.ndarray, np.ndarray]:
        radius = scale * math.sqrt(float(coverage_HW.mean()) / _unit_area(shape))
        crisp_HW = coverage(shape, centre=centre, radius=radius, image_px=len(coverage_HW))
        return crisp_HW, _soften(crisp_HW)

    candidates = [
        (shape, template_HW)
        for shape, scale in itertools.product(SHAPES, TEMPLATE_SCALES)
        for template_HW in templates(shape, scale)
    ]
    return min(candidates, key=lambda candidate: np.square(candidate[1] - coverage_HW).sum())


def _soften(coverage_HW: np.ndarray) -> np.ndarray:
    """Blur by the 3 x 3 binomial kernel, a standard deviation of 0.7 pixels."""
    padded_HW = np.pad(coverage_HW, 1)
    rows_HW = (padded_HW[:-2] + 2 * padded_HW[1:-1] + padded_HW[2:]) / 4
    return (rows_HW[:, :-2] + 2 * rows_HW[:, 1:-1] + rows_HW[:, 2:]) / 4
