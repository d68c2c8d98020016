"""Painting with words: a picture that says where each phrase of a prompt is wanted (section 5).

A painting is a set of phrases, each with a mask and a strength, the paper's user scalar w'. It is
read from one picture whose colours name phrases, or from a directory of masks. `paint` finds the
tokens of each phrase in every text stream and gives them their planes of A, times w'; the network
adds them to the scores of its cross-attention (`ediffi.attention`).

Shapes: B batch, C channels, H W painting, T tokens.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ediffi.conditioning import Conditioning, Stream
from ediffi.encoders import TextEncoder
from ediffi.paint_planes import resize_paint
from ediffi.pictures import ImageError, decode_image

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_STRENGTH = 0.4  # w'

# Masks are brought to this size, whatever theirs: cross-attention works at 32 px and below, and
# a plane for every token of every picture of a batch must be held. The same for all pictures, so
# that none depends on the others in its batch.
PAINT_PX = 64

COLOUR_TOLERANCE = 8  # of 255 in each channel: what lossy formats and colour profiles may add
MASKS_NAME = "painting.json"  # in a directory of masks
_WHITE = "#ffffff"
_NUM_COLOURS_TOLD = 8


@dataclass(frozen=True, eq=False)
class Phrase:
    """Words of a prompt, and where they are wanted."""

    text: str  # as it stands in the prompt
    mask_HW: Tensor  # float32 in [0, 1]; stretched to the picture
    strength: float = DEFAULT_STRENGTH  # w', at least 0

    def __post_init__(self) -> None:
        """Raise ValueError naming what is wrong."""
        if not self.text.strip():
            raise ValueError(f"a painted phrase must hold a word, got {self.text!r}")
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ValueError(
                f"strength of phrase {self.text!r} must be finite and at least 0, "
                f"got {self.strength}"
            )
        mask_HW = self.mask_HW
        if mask_HW.ndim != 2 or not mask_HW.numel() or mask_HW.dtype != torch.float32:
            raise ValueError(
                f"mask_HW of phrase {self.text!r} must be float32 of shape (H, W), "
                f"got {mask_HW.dtype} of shape {tuple(mask_HW.shape)}"
            )
        if not ((mask_HW >= 0) & (mask_HW <= 1)).all():
            raise ValueError(
                f"mask_HW of phrase {self.text!r} must lie in [0, 1], got values from "
                f"{mask_HW.min():g} to {mask_HW.max():g}"
            )

    @property
    def paints(self) -> bool:
        """Whether it changes anything."""
        return self.strength > 0 and bool(self.mask_HW.any())


@dataclass(frozen=True, eq=False)
class Painting:
    """The phrases of one picture; where several paint one token, their weights add up."""

    phrases: tuple[Phrase, ...]

    def __post_init__(self) -> None:
        """Take any sequence of phrases; ValueError if it is empty."""
        object.__setattr__(self, "phrases", tuple(self.phrases))
        if not self.phrases:
            raise ValueError("a painting must have at least one phrase, got none")

    @classmethod
    def from_picture(
        cls,
        picture: Image | str | Path,
        phrases: Mapping[str, str],
        strengths: Mapping[str, float] | None = None,
    ) -> Painting:
        """Read areas of one colour each; white and colours without a phrase stay unpainted.

        Args:
            picture: of any size and format of `ediffi.pictures`; lossless formats keep colours.
            phrases: from colours, "#rrggbb", to words of the prompt.
            strengths: by the same colours; DEFAULT_STRENGTH where none is given.

        Raises:
            ValueError: no picture, a colour that is not in it, or that is none.
        """
        pixels_HW3 = _pixels(picture)
        named = {_colour(colour): text for colour, text in phrases.items()}
        given = {_colour(colour): value for colour, value in (strengths or {}).items()}
        if len(named) < len(phrases):
            raise ValueError(f"every colour must name one phrase, got {', '.join(phrases)}")
        if unknown := sorted(set(given) - set(named)):
            raise ValueError(
                f"a strength belongs to a colour with a phrase; {', '.join(unknown)} is none of "
                f"{', '.join(named)}"
            )
        masks = _colour_masks(pixels_HW3, tuple(named))
        if absent := [colour for colour, mask_HW in masks.items() if not mask_HW.any()]:
            raise ValueError(
                f"every named colour must be in the painting; {', '.join(absent)} is not: "
                f"it has {_colours_found(pixels_HW3)}"
            )
        return cls(
            tuple(
                Phrase(text, masks[colour], given.get(colour, DEFAULT_STRENGTH))
                for colour, text in named.items()
            )
        )

    @classmethod
    def from_masks(cls, directory: str | Path) -> Painting:
        """Read `painting.json` and the grey PNGs it names: white is painted, black is not.

        {"phrases": [{"mask": "left.png", "phrase": "a red circle", "strength": 0.4}, ...]};
        strength may be left out.

        Raises:
            ValueError: a file is missing, damaged, outside the directory or not of this form.
        """
        directory = Path(directory)
        return cls(tuple(_read_phrase(directory, entry) for entry in _mask_entries(directory)))


def _pixels(picture: Image | str | Path) -> np.ndarray:
    """Read a picture as uint8 (H, W, 3), transparency on white."""
    from PIL import Image

    if isinstance(picture, (str, Path)):
        return np.asarray(_decoded(Path(picture)))
    white = Image.new("RGBA", picture.size, _WHITE)
    return np.asarray(Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB"))


def _decoded(path: Path) -> Image:
    if not path.is_file():
        raise ValueError(f"a painting must be a picture, found no file {path}")
    try:
        return decode_image(path.read_bytes())
    except ImageError as error:
        raise ValueError(f"{path} must be a picture that can be read, got {error}") from error


def _colour(text: str) -> str:
    if not re.fullmatch("#[0-9a-fA-F]{6}", text):
        raise ValueError(f"a colour must be written as #rrggbb, such as #ff0000, got {text!r}")
    if text.lower() == _WHITE:
        raise ValueError(f"{_WHITE} must have no phrase: white stays unpainted")
    return text.lower()


def _colour_masks(pixels_HW3: np.ndarray, colours: Sequence[str]) -> dict[str, Tensor]:
    """Give each pixel to the nearest of the colours, if it is within COLOUR_TOLERANCE."""
    nearest_HW = np.full(pixels_HW3.shape[:2], -1)
    least_HW = np.full(pixels_HW3.shape[:2], COLOUR_TOLERANCE + 1, dtype=np.int16)
    for index, colour in enumerate(colours):
        rgb = np.array(list(bytes.fromhex(colour[1:])), dtype=np.int16)
        distance_HW = np.abs(pixels_HW3 - rgb).max(axis=2)
        nearest_HW[distance_HW < least_HW] = index
        least_HW = np.minimum(distance_HW, least_HW)
    return {
        colour: torch.from_numpy((nearest_HW == index).astype(np.float32))
        for index, colour in enumerate(colours)
    }


def _colours_found(pixels_HW3: np.ndarray) -> str:
    """Name the commonest colours, with their shares of the picture."""
    codes = pixels_HW3.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    colours, counts = np.unique(codes, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_NUM_COLOURS_TOLD]
    told = ", ".join(f"#{colours[i]:06x} ({counts[i] / codes.size:.1%})" for i in order)
    return told + (" and others" if len(colours) > len(order) else "")


def _mask_entries(directory: Path) -> list[Mapping[str, Any]]:
    path = directory / MASKS_NAME
    if not path.is_file():
        raise ValueError(f"a directory of masks must hold {MASKS_NAME}, found none in {directory}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no UTF-8, no JSON
        raise ValueError(f"{path} must be JSON, got {error}") from error
    entries = record.get("phrases") if isinstance(record, dict) else None
    if not isinstance(entries, list) or set(record) != {"phrases"}:
        raise ValueError(f'{path} must be {{"phrases": [...]}} and no more, got {record!r}')
    for index, entry in enumerate(entries):
        keys = set(entry) if isinstance(entry, dict) else set()
        if not ({"mask", "phrase"} <= keys <= {"mask", "phrase", "strength"}):
            raise ValueError(
                f"{path}: phrases[{index}] must have mask, phrase and, if wanted, strength; "
                f"got {entry!r}"
            )
    return entries


def _read_phrase(directory: Path, entry: Mapping[str, Any]) -> Phrase:
    from PIL import Image

    text, strength = entry["phrase"], entry.get("strength", DEFAULT_STRENGTH)
    if not isinstance(text, str):
        raise ValueError(f"{directory / MASKS_NAME}: phrase must be text, got {entry!r}")
    if isinstance(strength, bool) or not isinstance(strength, (int, float)):
        raise ValueError(f"{directory / MASKS_NAME}: strength must be a number, got {entry!r}")
    path = _inside(directory, entry["mask"])
    grey = _decoded(path).convert("L")
    if Image.open(BytesIO(path.read_bytes())).has_transparency_data:
        raise ValueError(f"{path} must be grey without transparency: white is painted, black not")
    return Phrase(text, torch.from_numpy(np.asarray(grey, dtype=np.float32) / 255), strength)


def _inside(directory: Path, name: object) -> Path:
    """Return the path of a mask; ValueError if it leads out of the directory."""
    if not isinstance(name, str) or not name.endswith(".png"):
        raise ValueError(f"{directory / MASKS_NAME}: mask must name a .png file, got {name!r}")
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        raise ValueError(
            f"{directory / MASKS_NAME}: mask must lie inside the directory, got {name!r}"
        )
    return path


def paint(
    conditioning: Conditioning,
    prompts: Sequence[str],
    paintings: Sequence[Painting | None],
    encoders: Mapping[str, TextEncoder],
) -> Conditioning:
    """Give the phrases' tokens their planes, in every text stream.

    What paints nothing leaves no trace: at strength 0 the conditioning itself comes back.

    Args:
        conditioning: of the encoded prompts; earlier paint is replaced.
        prompts: what each sample's streams encode.
        paintings: one for each sample; None: unpainted.
        encoders: of the text streams, by name; streams that the conditioning lacks are passed over.

    Raises:
        ValueError: lengths differ, no text stream is there, a phrase is not in its prompt or
            was cut off, or the streams encode something else than the prompts.
    """
    if not len(prompts) == len(paintings) == conditioning.batch_size:
        raise ValueError(
            f"every one of {conditioning.batch_size} samples must have a prompt and a painting "
            f"or None, got {len(prompts)} prompts and {len(paintings)} paintings"
        )
    phrases = [
        [] if painting is None else [phrase for phrase in painting.phrases if phrase.paints]
        for painting in paintings
    ]
    names = [name for name in encoders if name in conditioning.streams]
    if not names and any(phrases):
        raise ValueError(
            "painting needs a text stream and its encoder; the streams are "
            f"{', '.join(conditioning.streams) or 'none'}, the encoders "
            f"{', '.join(encoders) or 'none'}"
        )
    unpainted = conditioning.without_paint()
    if not any(phrases):
        return unpainted
    streams = dict(unpainted.streams)
    for name in names:
        paint_BTHW = _planes(name, streams[name], prompts, phrases, encoders[name])
        streams[name] = replace(streams[name], paint_BTHW=paint_BTHW)
    return replace(unpainted, streams=streams)


def _planes(
    name: str,
    stream: Stream,
    prompts: Sequence[str],
    phrases: Sequence[Sequence[Phrase]],
    encoder: TextEncoder,
) -> Tensor:
    """Return w' A of one stream, (B, T, PAINT_PX, PAINT_PX); blank where it is dropped."""
    if stream.mask_BT is None:
        raise ValueError(f"stream {name} must have tokens to paint, got none")
    mask_BT = stream.mask_BT.cpu()
    paint_BTHW = torch.zeros(*mask_BT.shape, PAINT_PX, PAINT_PX)
    for sample_index, prompt in enumerate(prompts):
        num_tokens = int(mask_BT[sample_index].sum())
        for phrase in phrases[sample_index] if num_tokens else ():
            indices = encoder.find_phrase(prompt, phrase.text)
            if indices[-1] >= num_tokens:
                raise ValueError(
                    f"sample {sample_index}: stream {name} must encode the prompt {prompt!r}, "
                    f"got {num_tokens} tokens, too few to hold {phrase.text!r}"
                )
            plane_11HW = resize_paint(phrase.mask_HW[None, None], (PAINT_PX, PAINT_PX))
            paint_BTHW[sample_index, list(indices)] += phrase.strength * plane_11HW[0]
    return paint_BTHW.to(stream.mask_BT.device)
