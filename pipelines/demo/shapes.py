"""The embedded data set of the demo: one coloured shape on white, with its caption.

Six colours, four shapes and five positions give 120 combinations, each with a caption such as
"a red circle on the left". A fifth of the combinations is held out of training, yet every pair
of attributes still occurs there: a model that draws held-out captions right has composed what it
learned instead of remembering it.
"""

import io
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

Split = Literal["train", "held_out"]

# Seen from white, any two lie 30 degrees apart or more: the detector reads directions.
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (225, 30, 40),
    "yellow": (250, 205, 10),
    "green": (0, 180, 40),
    "cyan": (0, 210, 235),
    "blue": (30, 50, 215),
    "magenta": (205, 40, 210),
}
SHAPES = ("circle", "square", "triangle", "ring")
# Centre of the shape (x, y) as fractions of the picture; y grows downwards.
POSITIONS: Mapping[str, tuple[float, float]] = {
    "on the left": (0.3, 0.5),
    "on the right": (0.7, 0.5),
    "at the top": (0.5, 0.3),
    "at the bottom": (0.5, 0.7),
    "in the centre": (0.5, 0.5),
}
WHITE = 255

RADIUS_FRACTION = (0.18, 0.23)  # of the picture's side; every shape then fits inside the picture
JITTER_FRACTION = 0.025  # the centre moves at most this far along x and along y
RING_HOLE_FRACTION = 0.55  # of the ring's radius
SUPERSAMPLING = 8  # coverage is measured on an 8 x 8 grid inside every pixel

CAPTIONS_FILE = "captions.parquet"
PICTURES_FOLDER = "pictures"
DRAWING_VERSION = 1  # bump when equal settings would give other pictures
_SETTINGS_KEY = b"ediffi.shapes"


def _require_known(field: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{field} must be one of {', '.join(choices)}; got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class Combination:
    """What one picture shows. Raises ValueError for a colour, shape or position not in the set."""

    colour: str
    shape: str
    position: str

    def __post_init__(self) -> None:
        _require_known("colour", self.colour, tuple(COLOURS))
        _require_known("shape", self.shape, SHAPES)
        _require_known("position", self.position, tuple(POSITIONS))

    @property
    def caption(self) -> str:
        """The one caption of this combination, such as "a red circle on the left"."""
        return f"a {self.colour} {self.shape} {self.position}"


COMBINATIONS: tuple[Combination, ...] = tuple(
    Combination(colour=colour, shape=shape, position=position)
    for colour, shape, position in itertools.product(COLOURS, SHAPES, POSITIONS)
)


def split_of(combination: Combination) -> Split:
    """The split that holds every picture of ``combination``.

    A diagonal through the 6 x 4 x 5 grid: each (colour, shape) loses one position of five, each
    (colour, position) at most one shape of four, each (shape, position) at most two colours of
    six. So 24 of 120 combinations are held out and no pair of attributes goes missing.
    """
    diagonal = (
        list(COLOURS).index(combination.colour)
        + SHAPES.index(combination.shape)
        + list(POSITIONS).index(combination.position)
    )
    return "held_out" if diagonal % len(POSITIONS) == 0 else "train"


def combinations_of(split: Split) -> tuple[Combination, ...]:
    """Every combination of ``split``, in the order of ``COMBINATIONS``."""
    return tuple(c for c in COMBINATIONS if split_of(c) == split)


# ---- drawing -------------------------------------------------------------------------------------


def _corners(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of ``shape`` in units of its radius, its centroid at the origin, y downwards."""
    if shape == "square":
        return ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9))
    assert shape == "triangle", shape
    angles = (math.radians(degrees) for degrees in (-90, 30, 150))
    return tuple((1.15 * math.cos(angle), 1.15 * math.sin(angle)) for angle in angles)


def _disc(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    return (x - radius, y - radius, x + radius, y + radius)


def coverage(
    shape: str, *, centre: tuple[float, float], radius: float, image_px: int
) -> np.ndarray:
    """The fraction of every pixel that ``shape`` covers.

    centre: (x, y), radius: both as fractions of the picture's side.
    Returns float32 (H, W) in [0, 1] with H = W = ``image_px``.
    """
    side_px = image_px * SUPERSAMPLING
    mask = Image.new("L", (side_px, side_px), 0)
    pen = ImageDraw.Draw(mask)
    x, y, scale = centre[0] * side_px, centre[1] * side_px, radius * side_px
    if shape in ("circle", "ring"):
        pen.ellipse(_disc(x, y, scale), fill=WHITE)
        if shape == "ring":
            pen.ellipse(_disc(x, y, RING_HOLE_FRACTION * scale), fill=0)
    else:
        pen.polygon([(x + scale * u, y + scale * v) for u, v in _corners(shape)], fill=WHITE)
    return np.asarray(mask.reduce(SUPERSAMPLING), dtype=np.float32) / WHITE


def paint(coverage_HW: np.ndarray, colour: str) -> np.ndarray:
    """Lay ``colour`` over white where ``coverage_HW`` says so. Returns uint8 (H, W, 3)."""
    contrast_C = WHITE - np.asarray(COLOURS[colour], dtype=np.float32)
    return np.rint(WHITE - coverage_HW[..., None] * contrast_C).astype(np.uint8)


def draw(combination: Combination, *, image_px: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one picture, its size and place jittered by ``rng``. Returns uint8 (H, W, 3)."""
    x, y = POSITIONS[combination.position]
    dx, dy = rng.uniform(-JITTER_FRACTION, JITTER_FRACTION, size=2)
    radius = rng.uniform(*RADIUS_FRACTION)
    shape_HW = coverage(
        combination.shape, centre=(x + dx, y + dy), radius=radius, image_px=image_px
    )
    return paint(shape_HW, combination.colour)


# ---- writing -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Everything that decides the bytes of the data set; kept inside its parquet file."""

    image_px: int
    num_train: int
    num_per_held_out: int
    seed: int
    drawing_version: int = DRAWING_VERSION

    def __post_init__(self) -> None:
        for field, least in (("image_px", 8), ("num_train", 0), ("num_per_held_out", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be at least {least}; got {getattr(self, field)}.")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative; got {self.seed}.")

    def num_pictures(self, split: Split) -> int:
        if split == "train":
            return self.num_train
        return self.num_per_held_out * len(combinations_of("held_out"))


def write_data_set(
    directory: Path,
    *,
    image_px: int = 32,
    num_train: int = 1500,
    num_per_held_out: int = 8,
    seed: int = 0,
) -> Path:
    """Write the pictures as PNG and ``captions.parquet`` last; return that file's path.

    The parquet has the columns url (relative to ``directory``), caption, key, split, colour,
    shape, position. It exists only when every picture does, so a killed call is repaired by the
    same call, and a call on a finished data set returns at once. Equal arguments give equal bytes.
    num_train: pictures of the training combinations, spread evenly over them.
    num_per_held_out: pictures of each held-out combination.
    Raises ValueError for impossible sizes, or when ``directory`` holds another data set.
    """
    settings = _Settings(
        image_px=image_px, num_train=num_train, num_per_held_out=num_per_held_out, seed=seed
    )
    captions_path = directory / CAPTIONS_FILE
    if captions_path.exists():
        _require_same_settings(captions_path, settings)
        return captions_path
    (directory / PICTURES_FOLDER).mkdir(parents=True, exist_ok=True)
    rows = [
        *_write_split(directory, "train", settings),
        *_write_split(directory, "held_out", settings),
    ]
    metadata = {_SETTINGS_KEY: json.dumps(asdict(settings)).encode()}
    columns = ("url", "caption", "key", "split", "colour", "shape", "position")
    schema = pa.schema([(column, pa.string()) for column in columns], metadata=metadata)
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), table)
    _write_atomically(captions_path, table.getvalue())
    return captions_path


def _write_split(directory: Path, split: Split, settings: _Settings) -> list[dict[str, str]]:
    combinations = combinations_of(split)
    rows = []
    for index in range(settings.num_pictures(split)):
        combination = combinations[index % len(combinations)]
        key = f"{split}-{index:06d}"
        url = f"{PICTURES_FOLDER}/{key}.png"
        # Seeded per picture: a longer data set begins with the pictures of a shorter one.
        rng = np.random.default_rng([settings.seed, int(split == "held_out"), index])
        picture = io.BytesIO()
        Image.fromarray(draw(combination, image_px=settings.image_px, rng=rng)).save(picture, "PNG")
        _write_atomically(directory / url, picture.getvalue())
        rows.append(
            {"url": url, "caption": combination.caption, "key": key, "split": split}
            | asdict(combination)
        )
    return rows


def _write_atomically(path: Path, data: bytes) -> None:
    """Write aside, then rename: a reader, or a second writer, never meets half a file."""
    aside_path = path.with_name(f".{path.name}.{os.getpid()}")
    aside_path.write_bytes(data)
    aside_path.replace(path)


def _require_same_settings(captions_path: Path, settings: _Settings) -> None:
    found = (pq.read_schema(captions_path).metadata or {}).get(_SETTINGS_KEY, b"unknown settings")
    wanted = json.dumps(asdict(settings))
    if found.decode() != wanted:
        raise ValueError(
            f"{captions_path} holds another data set: required {wanted}, found {found.decode()}. "
            "Choose another directory, or delete this one."
        )
