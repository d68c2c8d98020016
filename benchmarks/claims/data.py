"""The two data sets of the claims, made from the emoji: single pictures, and pairs of them.

Single pictures carry two captions each, one that names the drawing style and one that does not, so
that style can come from the text or from a picture. Pairs put two emoji of different colours side
by side under a caption that does not say where: painting has to.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image

from pipelines.colours import COLOURS

LIST_NAME = "list.parquet"
STYLES = {"openmoji": "outlined", "noto": "shaded", "fluent": "flat"}
OBJECTS = ("heart", "circle", "square", "book", "apple")
PAIR_PX = 64
_UNSTYLED = "-unstyled"
HELD_OUT_FRACTION = 0.15  # of the combinations of two captions

Row = Mapping[str, Any]


def read_emoji(folder: Path) -> list[Row]:
    """Rows of the emoji's list, in order."""
    return read_list(folder / "emoji.parquet")


def read_list(path: Path) -> list[Row]:
    """Rows of a list that this module wrote."""
    rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


def unstyled(row: Row) -> str:
    """The long caption without the word for the style: `icon of red heart, ...`."""
    return str(row["caption_long"]).removeprefix(f"{STYLES[row['style']]} ")


def is_styled(row: Row) -> bool:
    """Whether the caption of a row that `write_singles` made names the style."""
    return not str(row["key"]).endswith(_UNSTYLED)


def write_singles(folder: Path, directory: Path) -> Path:
    """List every emoji twice, with and without its style's name; returns the list's path.

    The pictures are copied beside the list: a list may not lead out of its own folder.
    """
    shutil.copytree(folder / "images", directory / "images", dirs_exist_ok=True)
    rows = [
        {"url": row["url"], "key": row["key"] + suffix, "caption": caption, "split": row["split"]}
        for row in read_emoji(folder)
        for suffix, caption in (("", row["caption_long"]), (_UNSTYLED, unstyled(row)))
    ]
    return _write_list(rows, directory)


def write_pairs(folder: Path, directory: Path) -> Path:
    """Draw pairs of coloured emoji and list them; returns the list's path."""
    rows = list(_pairs(folder, directory / "pictures"))
    return _write_list(rows, directory)


def coloured(rows: Iterable[Row]) -> list[Row]:
    """Training emoji such as `red heart`: one colour, one object."""
    pattern = re.compile(f"({'|'.join(COLOURS)}) ({'|'.join(OBJECTS)})")
    return [row for row in rows if row["split"] == "train" and pattern.fullmatch(row["caption"])]


def colour_of(caption: str) -> str:
    """The colour that a caption such as `red heart` begins with."""
    return caption.split()[0]


def is_held_out(first: str, second: str) -> bool:
    """Whether training never sees these two together; the same in either order."""
    digest = hashlib.sha256(" and ".join(sorted((first, second))).encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_FRACTION * 2**64


def _pairs(folder: Path, pictures: Path) -> Iterator[Row]:
    pictures.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    rows = coloured(read_emoji(folder))
    combinations = [
        (one, other, across)
        for one, other in itertools.permutations(rows, 2)
        if one["style"] == other["style"]
        and colour_of(one["caption"]) != colour_of(other["caption"])
        for across in (True, False)
    ]
    chance.shuffle(combinations)
    for index, (one, other, across) in enumerate(combinations):
        captions = [one["caption"], other["caption"]]
        name = f"{index:05d}.png"
        _beside(folder, one, other, across=across).save(pictures / name)
        chance.shuffle(captions)  # the order of the words says nothing about the places
        yield {
            "url": f"pictures/{name}",
            "key": f"pair-{index:05d}",
            "caption": " and ".join(captions),
            "split": "test" if is_held_out(*captions) else "train",
        }


def _beside(folder: Path, one: Row, other: Row, *, across: bool) -> Image.Image:
    """Two emoji on white, left and right if `across`, else above one another."""
    canvas = Image.new("RGB", (PAIR_PX, PAIR_PX), "white")
    half = PAIR_PX // 2
    for number, row in enumerate((one, other)):
        picture = (
            Image.open(folder / row["url"])
            .convert("RGB")
            .resize((half, half), Image.Resampling.LANCZOS)
        )
        shift, middle = number * half, half // 2
        canvas.paste(picture, (shift, middle) if across else (middle, shift))
    return canvas


def _write_list(rows: Sequence[Row], directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LIST_NAME
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path
