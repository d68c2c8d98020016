"""Pictures from strangers: decode encoded images strictly, bring them to the size of training.

Only a handful of raster formats is accepted: no decoder that runs another program is reachable.
Axes: B batch, H W in pixels, C = 3 (RGB).
"""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Resize = Literal["center_crop", "pad", "stretch"]
ImageErrorReason = Literal["image_truncated", "image_bomb", "image_undecodable"]

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_WHITE = (255, 255, 255)
# Where PIL finds EXIF or XMP; without them a tenth of the time of a small picture is saved.
_MAY_SAY_ORIENTATION = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


class ImageError(ValueError):
    """A picture was refused; `reason` is the word that receipts count."""

    def __init__(self, reason: ImageErrorReason, detail: str = "") -> None:
        super().__init__(reason, detail)  # both in args: the error crosses processes by pickle
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def decode_image(data: bytes, *, max_pixels: int = 64_000_000) -> Image.Image:
    """Decode PNG, JPEG, WebP, GIF (first frame) or BMP to RGB, alpha flattened on white.

    The EXIF orientation is applied. The pixel count is checked from the header, before anything
    is decoded; above twice its own limit (about 179 million) PIL refuses whatever `max_pixels` is.

    Raises:
        ImageError: `image_truncated`, `image_bomb` or `image_undecodable`.
    """
    from PIL import Image

    try:
        image = Image.open(BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("image_bomb", str(error)) from error
    except Exception as error:  # decoders raise every kind of error on damaged bytes
        raise ImageError(_decode_failure(data, error), str(error)) from error
    width_px, height_px = image.size
    if width_px * height_px > max_pixels:
        raise ImageError(
            "image_bomb", f"{width_px} x {height_px} pixels, at most {max_pixels} allowed"
        )
    try:
        return _to_rgb(image)
    except Exception as error:
        raise ImageError(_decode_failure(data, error), str(error)) from error


def _decode_failure(data: bytes, error: Exception) -> ImageErrorReason:
    """Tell cut data from damaged data: by PIL's words, or by the missing end of the format."""
    cut = "truncated" in str(error).lower()
    if data.startswith(b"\x89PNG"):
        cut = cut or b"IEND" not in data
    elif data.startswith(b"\xff\xd8"):  # JPEG, start of image
        cut = cut or b"\xff\xd9" not in data  # end of image
    elif data.startswith(b"RIFF"):  # WebP announces its length
        cut = cut or int.from_bytes(data[4:8], "little") + 8 > len(data)
    return "image_truncated" if cut else "image_undecodable"


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image, ImageOps

    image.load()
    if not image.info.keys().isdisjoint(_MAY_SAY_ORIENTATION):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bit grey, which convert("RGB") would clip at 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, (*_WHITE, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def fit_image(image: Image.Image, image_px: int, resize: Resize) -> NDArray[np.uint8]:
    """Bring an RGB picture to image_px x image_px: uint8 (H, W, 3), antialiased (bicubic).

    `center_crop` cuts the longer side, `pad` adds a white border, `stretch` distorts.

    Raises:
        ValueError: unknown `resize`, or `image_px` below 1.
    """
    check_fit(image_px, resize)
    if image.size == (image_px, image_px):
        return np.array(image)
    if resize == "center_crop":
        fitted = _center_crop(image, image_px)
    elif resize == "pad":
        fitted = _pad(image, image_px)
    else:
        fitted = _scale(image, (image_px, image_px), (0, 0, *image.size))
    return np.array(fitted)


def to_pil(pictures_BCHW: Tensor) -> list[Image.Image]:
    """PIL pictures from uint8 (B, 3, H, W)."""
    from PIL import Image

    return [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pictures_BCHW.cpu()]


def check_fit(image_px: int, resize: str) -> None:
    """Raise ValueError unless `fit_image` would accept these settings."""
    if image_px < 1:
        raise ValueError(f"image_px must be at least 1, got {image_px}")
    if resize not in get_args(Resize):
        choices = ", ".join(get_args(Resize))
        raise ValueError(f"resize must be one of {choices}, got {resize!r}")


def _scale(
    image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]
) -> Image.Image:
    from PIL import Image

    return image.resize(size, Image.Resampling.BICUBIC, box=box)


def _center_crop(image: Image.Image, image_px: int) -> Image.Image:
    width_px, height_px = image.size
    side_px = min(width_px, height_px)
    left, top = (width_px - side_px) / 2, (height_px - side_px) / 2
    return _scale(image, (image_px, image_px), (left, top, left + side_px, top + side_px))


def _pad(image: Image.Image, image_px: int) -> Image.Image:
    from PIL import Image

    factor = image_px / max(image.size)
    width_px, height_px = (max(1, round(side_px * factor)) for side_px in image.size)
    inner = _scale(image, (width_px, height_px), (0, 0, *image.size))
    canvas = Image.new("RGB", (image_px, image_px), _WHITE)
    canvas.paste(inner, ((image_px - width_px) // 2, (image_px - height_px) // 2))
    return canvas
