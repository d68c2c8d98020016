"""The detector on drawn, degraded and foreign pictures, and the alignment report it yields."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pipelines.demo import detector, shapes

FRESH_SEED = 20_231  # not the seed of any data set the demo writes


def picture_of(
    combination: shapes.Combination,
    rng: np.random.Generator,
    *,
    image_px: int = 16,
    noise_std: float = 0.0,
    blur_px: float = 0.0,
) -> np.ndarray:
    """A picture drawn at 32 px, resized as ingest does, then degraded: uint8 (3, H, W)."""
    picture = Image.fromarray(shapes.draw(combination, image_px=32, rng=rng))
    picture = picture.resize((image_px, image_px), Image.Resampling.LANCZOS)
    if blur_px > 0:
        picture = picture.filter(ImageFilter.GaussianBlur(blur_px))
    noisy_HWC = np.asarray(picture) + rng.normal(0, noise_std, (image_px, image_px, 3))
    return np.rint(noisy_HWC).clip(0, 255).astype(np.uint8).transpose(2, 0, 1)


def fraction_read_right(
    *, image_px: int = 16, noise_std: float = 0.0, blur_px: float = 0.0
) -> float:
    rng = np.random.default_rng(FRESH_SEED)
    wanted = [combination for combination in shapes.COMBINATIONS for _ in range(2)]
    pictures_NCHW = np.stack(
        [
            picture_of(c, rng, image_px=image_px, noise_std=noise_std, blur_px=blur_px)
            for c in wanted
        ]
    )
    return detector.score_alignment(pictures_NCHW, [c.caption for c in wanted]).all_fraction


@pytest.mark.parametrize("image_px", [16, 32])
def test_drawn_pictures_are_read_right(image_px: int) -> None:
    """At least 99 % of fresh pictures of all 120 combinations are read right in everything."""
    assert fraction_read_right(image_px=image_px) >= 0.99


@pytest.mark.parametrize(("noise_std", "blur_px"), [(12.0, 0.0), (0.0, 1.0), (12.0, 0.6)])
def test_degraded_pictures_are_read_right(noise_std: float, blur_px: float) -> None:
    """Noise and blur like those of generated pictures leave at least 95 % right."""
    assert fraction_read_right(noise_std=noise_std, blur_px=blur_px) >= 0.95


def foreign_pictures() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    disc_HW = shapes.coverage("circle", centre=(0.5, 0.5), radius=0.2, image_px=16)
    red_C = np.array(shapes.COLOURS["red"], np.uint8)
    two_HWC = np.minimum(
        *(
            shapes.paint(shapes.coverage("circle", centre=c, radius=0.2, image_px=16), "red")
            for c in ((0.25, 0.25), (0.75, 0.75))
        )
    )
    return {
        "white": np.full((3, 16, 16), 255, np.uint8),
        "black": np.zeros((3, 16, 16), np.uint8),
        "uniform noise": rng.integers(0, 256, (3, 16, 16), dtype=np.uint8),
        "noise on white": (255 - rng.exponential(20, (3, 16, 16))).clip(0).astype(np.uint8),
        "all red": np.broadcast_to(red_C[:, None, None], (3, 16, 16)),
        "grey disc": np.rint(255 - 200 * disc_HW).astype(np.uint8)[None].repeat(3, 0),
        "two discs": two_HWC.transpose(2, 0, 1),
    }


@pytest.mark.parametrize("name", foreign_pictures())
def test_foreign_pictures_show_nothing(name: str) -> None:
    """A picture without one clear shape of the set reads as nothing, not as its nearest."""
    assert detector.detect(foreign_pictures()[name]) is None


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((3, 16, 16), np.float32),
        np.zeros((16, 16, 3), np.uint8),
        np.zeros((3, 16, 12), np.uint8),
    ],
    ids=["float", "channels last", "not square"],
)
def test_other_arrays_are_refused(picture: np.ndarray) -> None:
    """The error says which layout is required and what was found."""
    with pytest.raises(ValueError, match=r"must be uint8 \(3, H, W\).*got"):
        detector.detect(picture)


def test_chance_is_what_a_blind_painter_scores() -> None:
    """One picture against every caption scores exactly 1/6, 1/4, 1/5, and chance for all three."""
    picture_CHW = picture_of(shapes.COMBINATIONS[37], np.random.default_rng(1))
    captions = [combination.caption for combination in shapes.COMBINATIONS]
    report = detector.score_alignment(np.stack([picture_CHW] * len(captions)), captions)
    assert report.colour_fraction == pytest.approx(1 / 6)
    assert report.shape_fraction == pytest.approx(1 / 4)
    assert report.position_fraction == pytest.approx(1 / 5)
    assert report.all_fraction == pytest.approx(report.chance_fraction) == pytest.approx(1 / 120)


def test_each_attribute_is_scored_by_itself() -> None:
    """A caption wrong in one attribute costs that attribute and the whole, not the other two."""
    rng = np.random.default_rng(2)
    shown = shapes.Combination(colour="blue", shape="ring", position="at the top")
    captions = [
        "a blue ring at the top",
        "a red ring at the top",
        "a blue square at the top",
        "a blue ring on the right",
    ]
    report = detector.score_alignment(
        np.stack([picture_of(shown, rng) for _ in captions]), captions
    )
    assert report.colour_right == (True, False, True, True)
    assert report.shape_right == (True, True, False, True)
    assert report.position_right == (True, True, True, False)
    assert report.all_right == (True, False, False, False)


def test_a_picture_of_nothing_is_wrong_in_everything() -> None:
    """An unreadable picture counts against the model; it is not left out."""
    report = detector.score_alignment(
        np.full((1, 3, 16, 16), 255, np.uint8), ["a red circle on the left"]
    )
    assert not any((*report.colour_right, *report.shape_right, *report.position_right))
    assert report.all_fraction == 0


@pytest.mark.parametrize(("num_pictures", "num_captions"), [(0, 0), (1, 2)])
def test_pictures_and_captions_must_pair_up(num_pictures: int, num_captions: int) -> None:
    """Nothing to score, or a caption without its picture, is an error."""
    pictures = np.full((num_pictures, 3, 16, 16), 255, np.uint8)
    with pytest.raises(ValueError, match="equally many"):
        detector.score_alignment(pictures, ["a red circle on the left"] * num_captions)


@pytest.mark.parametrize("combination", shapes.COMBINATIONS[::7], ids=lambda c: c.caption)
def test_parsing_inverts_the_caption(combination: shapes.Combination) -> None:
    """A caption of the data set parses to the combination that wrote it."""
    assert detector.parse_caption(combination.caption) == combination


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red circle",
        "A red circle on the left",
        "a red circle on the left ",
        "an orange circle on the left",
        "a red circle and a blue square",
    ],
)
def test_foreign_captions_are_refused(caption: str) -> None:
    """Parsing is strict: a near miss is an error that shows the vocabulary."""
    with pytest.raises(ValueError, match="caption must read like 'a red circle on the left'"):
        detector.parse_caption(caption)
