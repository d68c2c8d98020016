"""Random degradation: pure, sized right, damaging in each of its ways, published defaults."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ediffi.degradation import DegradationConfig, LowRes, Picture, degrade

CLEAN = DegradationConfig(kind="none")


def picture(image_px: int = 64) -> Picture:
    """A disc on a gradient: smooth, with edges, between 0 and 1."""
    y, x = np.mgrid[:image_px, :image_px] / image_px
    disc = ((x - 0.5) ** 2 + (y - 0.4) ** 2) < 0.08
    return np.stack([np.where(disc, 0.9, x), np.where(disc, 0.1, y), 0.5 * x + 0.5 * y]).astype(
        np.float32
    )


def made(seed: int, config: DegradationConfig, *, factor: int = 4, image_px: int = 64) -> Picture:
    low_res = LowRes(factor=factor, degradation=config)
    return degrade(picture(image_px), low_res, np.random.default_rng(seed))


@pytest.mark.parametrize(("factor", "image_px"), [(2, 8), (2, 32), (4, 16), (4, 64), (8, 256)])
@pytest.mark.parametrize("kind", ["none", "real_esrgan"])
def test_low_resolution_pictures_are_8_bit_pictures_of_their_size(
    kind: Any, factor: int, image_px: int
) -> None:
    """Whatever is drawn: finite, of 256 levels in [0, 1], the factor smaller; toys included."""
    for seed in range(12):
        low = made(seed, DegradationConfig(kind=kind), factor=factor, image_px=image_px)
        assert low.shape == (3, image_px // factor, image_px // factor)
        assert low.dtype == np.float32
        levels = low * 255
        np.testing.assert_allclose(levels, levels.round(), atol=1e-4)
        assert (low.min(), low.max()) >= (0, 0)
        assert low.max() <= 1


def test_degradation_is_a_function_of_picture_and_generator() -> None:
    """The same seed gives the same bytes, another seed others; the picture stays as it was."""
    before = picture()
    low_res = LowRes(factor=4)
    first, again, other = (
        degrade(before, low_res, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.array_equal(before, picture())


def test_no_degradation_is_antialiased_reduction() -> None:
    """`none` is PIL's bicubic, and draws nothing."""
    generator = np.random.default_rng(0)
    low = degrade(picture(), LowRes(factor=4, degradation=CLEAN), generator)
    assert generator.random() == np.random.default_rng(0).random()
    pixels = np.round(picture() * 255).astype(np.uint8).transpose(1, 2, 0)
    expected = np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(low * 255, expected.transpose(2, 0, 1), atol=1.01)


def still() -> dict[str, Any]:
    """A round that does nothing but keep the size."""
    return {
        "blur_probability": 0.0,
        "resize_probabilities": (0.0, 0.0, 1.0),
        "gaussian_probability": 1.0,
        "gaussian_std_8bit": (0.0, 0.0),
        "jpeg_quality": (100.0, 100.0),
    }


def quiet_config(**changes: Any) -> DegradationConfig:
    """Degradation that hardly does anything, but for `changes` of its first round."""
    config = DegradationConfig()
    first = replace(config.first, **(still() | changes))
    return replace(
        config, first=first, second=replace(config.second, **still()), final_sinc_probability=0.0
    )


def damage(config: DegradationConfig) -> float:
    """Root mean square distance of a grey picture from its clean reduction, mean over draws."""
    grey = np.repeat(picture().mean(axis=0, keepdims=True), 3, axis=0)  # JPEG halves colours' size
    clean, *worse = (
        degrade(grey, LowRes(factor=4, degradation=one), np.random.default_rng(seed))
        for seed, one in enumerate([CLEAN] + [config] * 8)
    )
    return float(np.mean([np.sqrt(((one - clean) ** 2).mean()) for one in worse]))


@pytest.mark.parametrize(
    "changes",
    [
        {"blur_probability": 1.0, "blur_std_px": (3.0, 3.0)},
        {"resize_probabilities": (0.0, 1.0, 0.0), "resize_range": (0.1, 1.0)},
        {"gaussian_std_8bit": (40.0, 40.0)},
        {"gaussian_probability": 0.0, "poisson_scale": (3.0, 3.0)},
        {"jpeg_quality": (5.0, 5.0)},
    ],
)
def test_each_part_does_damage(changes: dict[str, Any]) -> None:
    """Blur, resizing, both kinds of noise and JPEG each move the picture from the clean one."""
    assert damage(quiet_config(**changes)) > 1.2 * damage(quiet_config())


def test_noise_has_its_strength_and_may_be_grey() -> None:
    """Gaussian noise of 20 levels on the full picture; grey noise is equal in all channels."""
    flat = np.full((3, 64, 64), 0.5, dtype=np.float32)
    config = quiet_config(gaussian_std_8bit=(20.0, 20.0), grey_probability=1.0)
    low_res = LowRes(factor=2, degradation=config)
    noise = degrade(flat, low_res, np.random.default_rng(3)) - 0.5
    # JPEG at quality 100 rounds colours by a level or two
    assert np.abs(noise[0] - noise[1]).max() < 6 / 255
    # the mean of four pixels has half the deviation; the filters keep a bit more or less
    assert 5 / 255 < noise.std() < 16 / 255


def test_defaults_are_those_published_with_real_esrgan() -> None:
    """Numbers of options/train_realesrnet_x4plus.yml, at factor 4."""
    config = DegradationConfig()
    first, second = config.first, config.second
    assert config.kernel_px == (7, 21)
    assert (first.blur_std_px, second.blur_std_px) == ((0.2, 3), (0.2, 1.5))
    assert (first.resize_range, second.resize_range) == ((0.15, 1.5), (0.3, 1.2))
    assert first.resize_probabilities == (0.2, 0.7, 0.1)
    assert second.resize_probabilities == (0.3, 0.4, 0.3)
    assert (first.gaussian_std_8bit, second.gaussian_std_8bit) == ((1, 30), (1, 25))
    assert (first.poisson_scale, second.poisson_scale) == ((0.05, 3), (0.05, 2.5))
    assert first.jpeg_quality == second.jpeg_quality == (30, 95)
    assert (second.blur_probability, config.final_sinc_probability) == (0.8, 0.8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "blur"}, "kind must be one of none, real_esrgan, got 'blur'"),
        ({"kernel_px": (21, 7)}, r"kernel_px must be two ascending numbers from 3 up, got \(21, 7"),
        ({"sinc_probability": 1.5}, r"sinc_probability must lie in \[0, 1\], got 1.5"),
    ],
)
def test_the_config_explains_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    """Each bad field is named with what was required and what was found."""
    with pytest.raises(ValueError, match=message):
        DegradationConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jpeg_quality": (0.0, 50.0)}, "jpeg_quality must be two ascending numbers from 1"),
        ({"blur_std_px": (3.0, 1.0)}, "blur_std_px must be two ascending"),
        ({"resize_probabilities": (0.5, 0.5, 0.5)}, "three shares that sum to 1"),
        ({"resize_range": (1.1, 1.5)}, r"resize_range must hold 1, got \(1.1, 1.5\)"),
        ({"grey_probability": -0.1}, "grey_probability must lie in"),
    ],
)
def test_a_round_explains_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    """So do the settings of one round."""
    with pytest.raises(ValueError, match=message):
        replace(DegradationConfig().first, **changes)


def test_pictures_that_cannot_be_reduced_evenly_are_refused() -> None:
    """Sides must be divisible by the factor, which must reduce something."""
    with pytest.raises(ValueError, match="divisible by 4 to be reduced, got 30 x 30"):
        degrade(picture(30), LowRes(factor=4), np.random.default_rng(0))
    with pytest.raises(ValueError, match="factor must be at least 2, got 1"):
        LowRes(factor=1)
