"""Tests of pipelines.paintings: a PNG with phrases, or a folder of masks, and a picture of it."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from ediffi.painting import DEFAULT_STRENGTH
from pipelines.paintings import read_painting, show_painting


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Red at the left, white at the right, 4 x 2 px."""
    path = tmp_path / "painting.png"
    canvas = Image.new("RGB", (4, 2), "white")
    canvas.paste((255, 0, 0), (0, 0, 2, 2))
    canvas.save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two masks: the left half, and the upper right corner."""
    path = tmp_path / "masks"
    path.mkdir()
    for name, box in {"a.png": (0, 0, 2, 2), "b.png": (3, 0, 4, 1)}.items():
        mask = Image.new("L", (4, 2), 0)
        mask.paste(255, box)
        mask.save(path / name)
    phrases = [
        {"mask": "a.png", "phrase": "a circle", "strength": 0.7},
        {"mask": "b.png", "phrase": "a square"},
    ]
    (path / "painting.json").write_text(json.dumps({"phrases": phrases}))
    return path


def test_a_picture_is_read_with_its_phrases(picture: Path) -> None:
    """The colour's pixels, the phrase and the strength belong together."""
    (phrase,) = read_painting(picture, {"#ff0000": "a circle"}, {"#ff0000": 0.9}).phrases
    assert (phrase.text, phrase.strength) == ("a circle", 0.9)
    assert torch.equal(phrase.mask_HW, torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 2))


def test_a_folder_says_all_itself(folder: Path) -> None:
    """Phrases and strengths come from its painting.json."""
    found = [(one.text, one.strength) for one in read_painting(folder, {}, {}).phrases]
    assert found == [("a circle", 0.7), ("a square", DEFAULT_STRENGTH)]


def test_what_does_not_go_together_is_refused(picture: Path, folder: Path) -> None:
    """A picture without phrases, a folder with them, and a path that leads nowhere."""
    with pytest.raises(ValueError, match=r"painting\.png is a picture, so that .* phrase"):
        read_painting(picture, {}, {})
    with pytest.raises(ValueError, match=r"masks is a folder of masks, whose painting\.json"):
        read_painting(folder, {"#ff0000": "a circle"}, {})
    with pytest.raises(ValueError, match=r"no painting at .*absent\.png"):
        read_painting(folder / "absent.png", {}, {})


def test_a_painting_is_shown_as_it_was_painted(picture: Path, folder: Path) -> None:
    """A picture is itself; of a folder each phrase is in a grey of its own, white elsewhere."""
    shown = show_painting(picture, read_painting(picture, {"#ff0000": "a circle"}, {}))
    assert (shown.getpixel((0, 0)), shown.getpixel((3, 1))) == ((255, 0, 0), (255, 255, 255))
    shown = show_painting(folder, read_painting(folder, {}, {}))
    assert (shown.mode, shown.size) == ("RGB", (4, 2))
    left, corner, nothing = (shown.getpixel(at) for at in ((1, 1), (3, 0), (3, 1)))
    assert nothing == (255, 255, 255)
    assert len({left, corner, nothing}) == 3
