"""Paintings: read from colours and from masks, found in the streams, and what they refuse.

Shapes: B batch, T tokens, D width, H W painting.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ediffi.conditioning import Conditioning, StreamConfig, collate
from ediffi.encoders import EncoderConfig, TextEncoder, load_encoder
from ediffi.paint_planes import resize_paint
from ediffi.painting import DEFAULT_STRENGTH, PAINT_PX, Painting, Phrase, paint
from tests.tiny_encoders import write_clip, write_t5

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
PHRASES = {"#ff0000": "a red circle", "#0000ff": "a blue square"}
PROMPT = "a red circle and a blue square"


def picture(mode: str = "RGB") -> Image.Image:
    """Return 8 x 4 pixels: two columns of red, two of blue, the rest white."""
    pixels_HW3 = np.full((4, 8, 3), 255, dtype=np.uint8)
    pixels_HW3[:, :2], pixels_HW3[:, 6:] = RED, BLUE
    return Image.fromarray(pixels_HW3).convert(mode)


def columns(*painted: int) -> Tensor:
    """Return the mask of 8 x 4 pixels that is 1 in some columns."""
    mask_HW = torch.zeros(4, 8)
    mask_HW[:, list(painted)] = 1
    return mask_HW


def test_colours_become_masks() -> None:
    """Each named colour is a phrase with its mask and strength; white stays unpainted."""
    painting = Painting.from_picture(picture(), PHRASES, {"#0000FF": 0.9})
    circle, square = painting.phrases
    assert (circle.text, square.text) == ("a red circle", "a blue square")
    assert torch.equal(circle.mask_HW, columns(0, 1))
    assert torch.equal(square.mask_HW, columns(6, 7))
    assert (circle.strength, square.strength) == (DEFAULT_STRENGTH, 0.9)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_pictures_of_any_mode_are_read_from_memory_and_from_files(
    mode: str, tmp_path: Path
) -> None:
    """A palette or an alpha channel changes nothing."""
    path = tmp_path / "painting.png"
    picture(mode).save(path)
    for source in (picture(mode), path, str(path)):
        painting = Painting.from_picture(source, {"#FF0000": "a red circle"})
        assert torch.equal(painting.phrases[0].mask_HW, columns(0, 1))


def test_transparency_is_unpainted(tmp_path: Path) -> None:
    """What can be seen through is white, whatever colour lies under it."""
    image = picture("RGBA")
    image.putalpha(Image.fromarray(np.where(columns(0).numpy() > 0, 0, 255).astype(np.uint8)))
    image.save(tmp_path / "painting.png")
    for source in (image, tmp_path / "painting.png"):
        painting = Painting.from_picture(source, PHRASES)
        assert torch.equal(painting.phrases[0].mask_HW, columns(1))


def test_only_colours_within_the_tolerance_are_painted() -> None:
    """A nearly red pixel is red, a pale red one is nothing; of two names the nearer counts."""
    image = picture()
    image.putpixel((4, 0), (250, 6, 0))
    image.putpixel((4, 1), (255, 40, 40))
    image.putpixel((4, 2), (244, 0, 0))
    phrases = {"#ff0000": "a red circle", "#f00000": "a dark one"}
    red, dark = Painting.from_picture(image, phrases).phrases
    expected = columns(0, 1)
    expected[0, 4] = 1
    assert torch.equal(red.mask_HW, expected)
    assert dark.mask_HW.nonzero().tolist() == [[2, 4]]


def test_an_absent_colour_is_named_with_those_there_are() -> None:
    """A misspelt colour is told beside what the picture holds."""
    message = "#00ff00 is not: it has #ffffff (50.0%), #0000ff (25.0%), #ff0000 (25.0%)"
    with pytest.raises(ValueError, match=re.escape(message)):
        Painting.from_picture(picture(), PHRASES | {"#00ff00": "grass"})


@pytest.mark.parametrize(
    ("phrases", "strengths", "message"),
    [
        ({"red": "a red circle"}, {}, "written as #rrggbb, such as #ff0000, got 'red'"),
        ({"#ffffff": "snow"}, {}, "white stays unpainted"),
        ({"#ff0000": "a", "#FF0000": "b"}, {}, "every colour must name one phrase"),
        ({"#ff0000": "a"}, {"#0000ff": 1.0}, "#0000ff is none of #ff0000"),
        ({"#ff0000": " "}, {}, "must hold a word"),
        ({"#ff0000": "a"}, {"#ff0000": -1.0}, "strength of phrase 'a' must be finite and at least"),
        ({}, {}, "at least one phrase"),
    ],
)
def test_pictures_explain_what_is_wrong(
    phrases: dict[str, str], strengths: dict[str, float], message: str
) -> None:
    """Colours, phrases and strengths are checked by name."""
    with pytest.raises(ValueError, match=message):
        Painting.from_picture(picture(), phrases, strengths)


def test_files_that_are_no_pictures_are_named(tmp_path: Path) -> None:
    """A path that leads nowhere, or to something else, is told."""
    with pytest.raises(ValueError, match=r"no file .*absent\.png"):
        Painting.from_picture(tmp_path / "absent.png", PHRASES)
    (tmp_path / "note.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"note\.png must be a picture that can be read"):
        Painting.from_picture(tmp_path / "note.png", PHRASES)


def write_masks(directory: Path, phrases: Any) -> Path:
    """Write a directory of masks: left.png, and right.png in halftones."""
    directory.mkdir(exist_ok=True)
    left = np.zeros((4, 8), dtype=np.uint8)
    left[:, :3] = 255
    Image.fromarray(left).save(directory / "left.png")
    Image.fromarray(np.full((2, 2), 51, dtype=np.uint8)).save(directory / "right.png")
    (directory / "painting.json").write_text(json.dumps({"phrases": phrases}))
    return directory


LEFT = {"mask": "left.png", "phrase": "a red circle", "strength": 0.7}


def test_a_directory_of_masks_is_read(tmp_path: Path) -> None:
    """Grey says how much, sizes may differ, strength has a default."""
    right = {"mask": "right.png", "phrase": "a blue square"}
    painting = Painting.from_masks(write_masks(tmp_path / "masks", [LEFT, right]))
    circle, square = painting.phrases
    assert torch.equal(circle.mask_HW, columns(0, 1, 2))
    assert (circle.text, circle.strength) == ("a red circle", 0.7)
    torch.testing.assert_close(square.mask_HW, torch.full((2, 2), 0.2))
    assert (square.text, square.strength) == ("a blue square", DEFAULT_STRENGTH)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": "../left.png"}, "must lie inside the directory"),
        ({"mask": "/etc/hosts.png"}, "must lie inside the directory"),
        ({"mask": "link.png"}, "must lie inside the directory"),
        ({"mask": "left.jpg"}, r"must name a \.png file"),
        ({"mask": 3}, r"must name a \.png file"),
        ({"mask": "absent.png"}, r"no file .*absent\.png"),
        ({"mask": "clear.png"}, "must be grey without transparency"),
        ({"colour": "#ff0000"}, r"phrases\[0\] must have mask, phrase and"),
        ({"phrase": 3}, "phrase must be text"),
        ({"strength": "much"}, "strength must be a number"),
        ({"strength": True}, "strength must be a number"),
        ({"strength": -0.1}, "must be finite and at least 0, got -0.1"),
    ],
)
def test_masks_explain_what_is_wrong(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Each bad entry is refused; no mask is read from outside the directory."""
    directory = write_masks(tmp_path / "masks", [LEFT | change])
    (directory / "left.png").with_name("link.png").symlink_to(tmp_path / "outside.png")
    Image.new("L", (2, 2), 255).save(tmp_path / "outside.png")
    Image.new("LA", (2, 2), (255, 0)).save(directory / "clear.png")
    with pytest.raises(ValueError, match=message):
        Painting.from_masks(directory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("[]", r'must be \{"phrases": \[...\]\}'),
        ('{"phrases": [], "more": 1}', "and no more"),
        ('{"phrases": [3]}', r"phrases\[0\] must have"),
        ('{"phrases": []}', "at least one phrase"),
    ],
)
def test_a_record_of_masks_of_another_form_is_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    """Whatever is not the format is told with the file's name or what is missing."""
    (tmp_path / "painting.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Painting.from_masks(tmp_path)


def test_a_directory_without_a_record_is_told(tmp_path: Path) -> None:
    """Masks alone do not say what they are of."""
    with pytest.raises(ValueError, match=r"must hold painting\.json"):
        Painting.from_masks(tmp_path)


@pytest.mark.parametrize(
    ("mask_HW", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.uint8), r"float32 of shape \(H, W\), got torch.uint8"),
        (torch.zeros(1, 2, 2), r"got torch.float32 of shape \(1, 2, 2\)"),
        (torch.zeros(0, 2), r"of shape \(0, 2\)"),
        (torch.full((2, 2), 2.0), r"must lie in \[0, 1\], got values from 2 to 2"),
        (torch.full((2, 2), torch.nan), r"must lie in \[0, 1\]"),
    ],
)
def test_a_phrase_checks_its_mask(mask_HW: Tensor, message: str) -> None:
    """Dtype, shape and range."""
    with pytest.raises(ValueError, match=message):
        Phrase("a red circle", mask_HW, 0.4)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextEncoder]:
    """A tiny T5 without a start token, and a tiny CLIP with one."""
    t5, clip = tmp_path_factory.mktemp("t5"), tmp_path_factory.mktemp("clip")
    write_t5(t5, ("a", "red", "circle", "and", "blue", "square"))
    write_clip(clip)
    configs = {
        "t5": EncoderConfig(family="transformers", weights=str(t5), max_tokens=12),
        "clip_text": EncoderConfig(family="open_clip_text", weights=str(clip), max_tokens=12),
    }
    loaded = {name: load_encoder(config) for name, config in configs.items()}
    return {name: one for name, one in loaded.items() if isinstance(one, TextEncoder)}


def encoded(encoders: dict[str, TextEncoder], *prompts: str) -> Conditioning:
    """Return the conditioning of prompts, with a blank picture stream beside the texts."""
    configs = [
        StreamConfig(name=name, token_width=one.token_width, pooled_width=one.pooled_width)
        for name, one in encoders.items()
    ]
    configs.append(StreamConfig(name="clip_image", pooled_width=3, pooled_as_token=True))
    streams = {name: one.encode(list(prompts)) for name, one in encoders.items()}
    samples = [
        {name: streams[name][i] for name in streams} | {"clip_image": {"pooled": torch.zeros(3)}}
        for i in range(len(prompts))
    ]
    return collate(samples, configs)


def planes(conditioning: Conditioning, name: str) -> Tensor:
    """Return the paint of one stream."""
    paint_BTHW = conditioning.streams[name].paint_BTHW
    assert paint_BTHW is not None
    return paint_BTHW


def test_both_text_streams_get_the_columns_of_the_phrase(encoders: dict[str, TextEncoder]) -> None:
    """The phrase's tokens get strength times mask, each stream's own tokens; all else is blank."""
    painting = Painting(
        (Phrase("a red circle", columns(0, 1, 2, 3), 0.5), Phrase("square", columns(7), 2.0))
    )
    conditioning = encoded(encoders, "blue", PROMPT)
    found = paint(conditioning, ["blue", PROMPT], [None, painting], encoders)
    masks = [
        resize_paint(mask[None, None], (PAINT_PX, PAINT_PX))[0, 0]
        for mask in (columns(0, 1, 2, 3), columns(7))
    ]
    for name, start in (("t5", 0), ("clip_text", 1)):
        expected = torch.zeros_like(planes(found, name))
        expected[1, start : start + 3] = 0.5 * masks[0]
        expected[1, start + 6] = 2.0 * masks[1]
        torch.testing.assert_close(planes(found, name), expected)
        assert planes(found, name).dtype == torch.float32
        assert found.streams[name].tokens_BTD is conditioning.streams[name].tokens_BTD
    assert found.streams["clip_image"].paint_BTHW is None


def test_phrases_that_share_tokens_add_up(encoders: dict[str, TextEncoder]) -> None:
    """Two areas of one phrase, or a word in two phrases: weights are sums."""
    phrases = (Phrase("a red circle", torch.ones(2, 2), 0.5), Phrase("red", torch.ones(3, 3), 0.25))
    found = paint(encoded(encoders, PROMPT), [PROMPT], [Painting(phrases)], encoders)
    assert planes(found, "t5")[0, :4, 0, 0].tolist() == [0.5, 0.75, 0.5, 0.0]


def test_nothing_painted_leaves_no_trace(encoders: dict[str, TextEncoder]) -> None:
    """Strength 0, empty masks and None give streams without paint: the same kernels, same bits."""
    conditioning = encoded(encoders, PROMPT, PROMPT, PROMPT)
    ones, blank = torch.ones(2, 2), torch.zeros(2, 2)
    paintings = [
        Painting((Phrase("a red circle", ones, 0.0),)),
        Painting((Phrase("a red circle", blank, 1.0),)),
        None,
    ]
    found = paint(conditioning, [PROMPT] * 3, paintings, encoders)
    assert all(stream.paint_BTHW is None for stream in found.streams.values())
    # and it takes earlier paint away
    first = Painting((Phrase("a red circle", ones, 1.0),))
    painted = paint(conditioning, [PROMPT] * 3, [first] * 3, encoders)
    again = paint(painted, [PROMPT] * 3, paintings, encoders)
    assert planes(painted, "t5").any()
    assert all(stream.paint_BTHW is None for stream in again.streams.values())


def test_a_painting_is_the_same_whatever_is_painted_beside_it(
    encoders: dict[str, TextEncoder],
) -> None:
    """Masks of other sizes in the batch do not change a picture's planes."""
    small = Painting((Phrase("a red circle", columns(0), 1.0),))
    large = Painting((Phrase("a red circle", torch.rand(100, 300), 1.0),))
    together = paint(encoded(encoders, PROMPT, PROMPT), [PROMPT] * 2, [small, large], encoders)
    alone = paint(encoded(encoders, PROMPT), [PROMPT], [small], encoders)
    for name in encoders:
        assert torch.equal(planes(together, name)[:1], planes(alone, name))


def test_low_resolution_pictures_stay(encoders: dict[str, TextEncoder]) -> None:
    """What is enlarged is not lost by painting."""
    plain = encoded(encoders, PROMPT)
    conditioning = Conditioning(plain.streams, 1, torch.zeros(1, 3, 4, 4))
    painting = Painting((Phrase("a red circle", torch.ones(1, 1), 1.0),))
    assert paint(conditioning, [PROMPT], [painting], encoders).low_res_BCHW is not None


def test_dropped_and_absent_streams_are_passed_over(encoders: dict[str, TextEncoder]) -> None:
    """A dropped stream stays blank; an encoder whose stream is not there does no harm."""
    conditioning = encoded(encoders, PROMPT)
    painting = Painting((Phrase("a red circle", torch.ones(1, 1), 1.0),))
    dropped = conditioning.drop({"t5": torch.tensor([False])})
    found = paint(dropped, [PROMPT], [painting], encoders)
    assert not planes(found, "t5").any()
    assert planes(found, "clip_text").any()
    only_clip = Conditioning({"clip_text": conditioning.streams["clip_text"]}, 1)
    assert planes(paint(only_clip, [PROMPT], [painting], encoders), "clip_text").any()


def test_painting_explains_what_is_wrong(encoders: dict[str, TextEncoder]) -> None:
    """Other lengths, no text stream, a phrase that is not there, states of another prompt."""
    conditioning = encoded(encoders, PROMPT)
    painting = Painting((Phrase("a red circle", torch.ones(1, 1), 1.0),))
    late = Painting((Phrase("blue square", torch.ones(1, 1), 1.0),))
    with pytest.raises(ValueError, match="got 2 prompts and 1 paintings"):
        paint(conditioning, [PROMPT] * 2, [painting], encoders)
    with pytest.raises(ValueError, match="needs a text stream and its encoder; the streams are"):
        paint(conditioning, [PROMPT], [painting], {})
    with pytest.raises(ValueError, match=r"'a red circle'.*'a blue square'"):
        paint(encoded(encoders, "a blue square"), ["a blue square"], [painting], encoders)
    with pytest.raises(ValueError, match=r"stream t5 must encode the prompt .*got 2 tokens"):
        paint(encoded(encoders, "blue"), [PROMPT], [late], encoders)
    with pytest.raises(ValueError, match="stream clip_image must have tokens to paint"):
        paint(conditioning, [PROMPT], [painting], {"clip_image": encoders["t5"]})
