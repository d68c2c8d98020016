"""Encoded pictures decode exactly or are refused with a reason; fitting keeps geometry."""

import pickle
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from ediffi.pictures import ImageError, decode_image, fit_image


def noise_picture(width_px: int = 24, height_px: int = 16) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height_px, width_px, 3), dtype=np.uint8))


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decoded_or_reason(data: bytes) -> np.ndarray | str:
    try:
        return np.array(decode_image(data))
    except ImageError as error:
        return error.reason


def reason_of(data: bytes, **options) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(data, **options)
    return caught.value.reason


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP"])
def test_lossless_formats_decode_exactly(format):
    """RGB pixels come back bit by bit."""
    image = noise_picture()
    options = {"lossless": True} if format == "WEBP" else {}
    decoded = decode_image(encode(image, format, **options))
    assert decoded.mode == "RGB"
    assert np.array_equal(np.array(decoded), np.array(image))


@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {})],
)
def test_every_cut_is_refused_or_harmless(format, options):
    """A cut picture is `image_truncated`, or (cut after the last pixel) decodes to the same."""
    data = encode(noise_picture(), format, **options)
    whole = np.array(decode_image(data))
    refused = 0
    cuts = range(16, len(data), 7)
    for num_bytes in cuts:
        outcome = decoded_or_reason(data[:num_bytes])
        if isinstance(outcome, str):
            assert outcome == "image_truncated"
            refused += 1
        else:
            assert np.array_equal(outcome, whole)
    assert refused >= 0.95 * len(cuts)


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"\0" * 100, b"%!PS-Adobe-3.0"])
def test_other_bytes_are_undecodable(data):
    """What is no picture, or a format whose decoder runs programs, is refused."""
    assert reason_of(data) == "image_undecodable"


def test_damaged_png_is_undecodable():
    """A flipped byte fails the checksum of its chunk."""
    data = bytearray(encode(noise_picture(), "PNG"))
    data[100] ^= 0xFF
    assert reason_of(bytes(data)) == "image_undecodable"


def png_header(width_px: int, height_px: int) -> bytes:
    """A PNG that announces any size and holds no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + header + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize("side_px", [8_001, 60_000])
def test_bomb_is_recognised_from_its_header(side_px):
    """The size announced is enough to refuse, below and above PIL's own limit."""
    assert reason_of(png_header(side_px, side_px)) == "image_bomb"


def test_pixel_limit_is_inclusive():
    """Exactly `max_pixels` pixels are allowed, one fewer is a bomb."""
    data = encode(noise_picture(10, 10), "PNG")
    assert decode_image(data, max_pixels=100).size == (10, 10)
    assert reason_of(data, max_pixels=99) == "image_bomb"


def test_alpha_is_flattened_on_white():
    """Transparent is white, half red is pink: in RGBA, in a palette and by a key colour."""
    rgba = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (255, 0, 0, 128))
    rgba.putpixel((2, 0), (0, 0, 0, 0))
    expected = [(255, 0, 0), (255, 127, 127), (255, 255, 255)]
    decoded = np.array(decode_image(encode(rgba, "PNG")))[0]
    assert [tuple(pixel) for pixel in decoded.tolist()] == expected

    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 255, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    decoded = np.array(decode_image(encode(palette, "PNG", transparency=1)))[0]
    assert decoded.tolist() == [[0, 0, 255], [255, 255, 255]]

    keyed = Image.new("RGB", (1, 1), (1, 2, 3))
    decoded = np.array(decode_image(encode(keyed, "PNG", transparency=(1, 2, 3))))
    assert decoded.tolist() == [[[255, 255, 255]]]


def test_sixteen_bit_grey_is_scaled_not_clipped():
    """16 bit values map to 8 bit by their range."""
    grey = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    decoded = np.array(decode_image(encode(grey, "PNG")))
    assert decoded[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    """Bilevel, grey, grey with alpha and CMYK white stay white in RGB."""
    format = "JPEG" if mode == "CMYK" else "PNG"
    white = Image.new("RGB", (8, 8), "white").convert(mode)
    decoded = decode_image(encode(white, format))
    assert decoded.mode == "RGB"
    assert np.array(decoded).min() == 255


def test_exif_orientation_is_applied():
    """A camera's rotation flag turns the pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    assert decode_image(encode(noise_picture(24, 16), "JPEG", exif=exif)).size == (16, 24)


def test_image_error_survives_pickling():
    """The reason arrives when the error crosses a process boundary."""
    error = pickle.loads(pickle.dumps(ImageError("image_bomb", "too large")))
    assert (error.reason, str(error)) == ("image_bomb", "image_bomb: too large")


@pytest.mark.parametrize("resize", ["center_crop", "pad", "stretch"])
def test_picture_of_the_right_size_is_untouched(resize):
    """No resampling happens where none is needed."""
    image = noise_picture(16, 16)
    fitted = fit_image(image, 16, resize)
    assert fitted.dtype == np.uint8
    assert np.array_equal(fitted, np.array(image))


def three_bands() -> Image.Image:
    """90 x 30 px: a red, a green and a blue square side by side."""
    bands = np.zeros((30, 90, 3), dtype=np.uint8)
    for band in range(3):
        bands[:, 30 * band : 30 * (band + 1), band] = 255
    return Image.fromarray(bands)


def test_center_crop_keeps_the_middle():
    """The outer thirds are cut away, the middle one fills the picture up to its edges' blur."""
    fitted = fit_image(three_bands(), 10, "center_crop")
    assert fitted.shape == (10, 10, 3)
    assert (fitted.argmax(axis=2) == 1).all()
    assert fitted[:, 2:-2].reshape(-1, 3).tolist() == [[0, 255, 0]] * 60


def test_pad_adds_white_above_and_below():
    """The whole picture is kept at its aspect ratio, on white."""
    fitted = fit_image(three_bands(), 9, "pad")
    assert fitted.shape == (9, 9, 3)
    assert fitted[:3].min() == fitted[6:].min() == 255
    assert fitted[4, [1, 4, 7]].argmax(axis=1).tolist() == [0, 1, 2]


def test_stretch_fills_the_square():
    """All of the picture fills all of the square."""
    fitted = fit_image(three_bands(), 9, "stretch")
    assert fitted[[0, 8]][:, [1, 4, 7]].argmax(axis=2).tolist() == [[0, 1, 2]] * 2


def test_downscaling_is_antialiased():
    """A fine checkerboard becomes even grey, not moiré."""
    checkers = np.indices((64, 64)).sum(axis=0) % 2 * 255
    image = Image.fromarray(np.repeat(checkers[:, :, None], 3, axis=2).astype(np.uint8))
    inner = fit_image(image, 8, "stretch")[1:-1, 1:-1].astype(int)
    assert np.abs(inner - 127.5).max() < 3


def test_thin_picture_can_be_padded():
    """A side that would round to zero keeps one pixel."""
    fitted = fit_image(Image.new("RGB", (1000, 1)), 16, "pad")
    assert (fitted != 255).any(axis=2).sum() == 16


def test_bad_settings_are_named():
    """The message lists the choices, or the limit."""
    image = noise_picture()
    with pytest.raises(ValueError, match="center_crop, pad, stretch, got 'fill'"):
        fit_image(image, 8, "fill")
    with pytest.raises(ValueError, match="image_px must be at least 1, got 0"):
        fit_image(image, 0, "pad")
