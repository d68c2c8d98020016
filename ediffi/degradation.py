"""How the low-resolution input of a super-resolution model is made of a picture.

eDiff-I trains its super-resolution models on randomly degraded inputs, after Real-ESRGAN (paper
section 4; arXiv 2107.10833, section 3): twice in a row blur, resizing, noise and JPEG, at last a
sinc filter that rings as real sharpening does. The paper gives no settings; the defaults are those
published with Real-ESRGAN for four-fold enlargement.

Those settings count pixels of the full picture at factor 4. At another factor, blur widths and
kernels are scaled by factor / 4, cut-off frequencies and the smallest first resizing by 4 / factor:
so the damage stays the same, measured in pixels of the low-resolution picture. Kernels never exceed
the picture. PIL's resizing, used here, smooths before it shrinks; the published code's does not, so
aliasing is rarer here.

Pictures are float32 in [0, 1]. Shapes: C = 3 (RGB), H W picture, h w low-resolution, K kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import BytesIO
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ediffi.blur import Picture, blur_kernel, convolve, sinc_kernel

Range = tuple[float, float]
Kind = Literal["none", "real_esrgan"]

_PUBLISHED_FACTOR = 4
# Families of blur kernels: exponent of the squared distance, form, equal in all directions, share.
_SHAPES: tuple[tuple[str, bool, float], ...] = (
    ("gaussian", True, 0.45),
    ("gaussian", False, 0.25),
    ("generalized", True, 0.12),
    ("generalized", False, 0.03),
    ("plateau", True, 0.12),
    ("plateau", False, 0.03),
)
_SHARES = np.array([share for _, _, share in _SHAPES])


def _check_range(field: str, ends: tuple[float, float], low: float, high: float) -> None:
    if not low <= ends[0] <= ends[1] <= high:
        raise ValueError(f"{field} must be two ascending numbers from {low} up, got {ends}")


def _check_fraction(field: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{field} must lie in [0, 1], got {value}")


@dataclass(frozen=True, kw_only=True)
class DegradationPass:
    """One round of blur, resizing, noise and JPEG. Pairs are the ends of uniform ranges."""

    blur_probability: float
    blur_std_px: Range
    resize_probabilities: tuple[float, float, float]  # enlarge, shrink, keep
    resize_range: Range  # of the factor; below 1 shrinks
    gaussian_probability: float = 0.5  # otherwise the noise is Poisson's
    gaussian_std_8bit: Range  # of 255
    poisson_scale: Range  # 1: photon noise of 256 levels
    grey_probability: float = 0.4  # noise equal in all channels
    jpeg_quality: Range = (30.0, 95.0)

    def __post_init__(self) -> None:
        """Check every field; ValueError names it, what was required and found."""
        for field in ("blur_std_px", "resize_range", "gaussian_std_8bit", "poisson_scale"):
            _check_range(field, getattr(self, field), 0.0, math.inf)
        _check_range("jpeg_quality", self.jpeg_quality, 1.0, 100.0)
        for field in ("blur_probability", "gaussian_probability", "grey_probability"):
            _check_fraction(field, getattr(self, field))
        shares = self.resize_probabilities
        if min(shares) < 0 or not math.isclose(sum(shares), 1.0):
            raise ValueError(
                f"resize_probabilities must be three shares that sum to 1, got {shares}"
            )
        if not 0 < self.resize_range[0] <= 1 <= self.resize_range[1]:
            raise ValueError(f"resize_range must hold 1, got {self.resize_range}")


_FIRST = DegradationPass(
    blur_probability=1.0,
    blur_std_px=(0.2, 3.0),
    resize_probabilities=(0.2, 0.7, 0.1),
    resize_range=(0.15, 1.5),
    gaussian_std_8bit=(1.0, 30.0),
    poisson_scale=(0.05, 3.0),
)
_SECOND = DegradationPass(
    blur_probability=0.8,
    blur_std_px=(0.2, 1.5),
    resize_probabilities=(0.3, 0.4, 0.3),
    resize_range=(0.3, 1.2),
    gaussian_std_8bit=(1.0, 25.0),
    poisson_scale=(0.05, 2.5),
)


@dataclass(frozen=True, kw_only=True)
class DegradationConfig:
    """How a picture is made worse. `none` is a clean antialiased (bicubic) reduction."""

    kind: Kind = "real_esrgan"
    first: DegradationPass = _FIRST  # its resizing counts from the full size
    second: DegradationPass = _SECOND  # its resizing counts from the low-resolution size
    kernel_px: tuple[int, int] = (7, 21)  # sides of blur and sinc kernels; odd ones are drawn
    sinc_probability: float = 0.1  # share of blurs that are sinc filters
    generalized_beta: Range = (0.5, 4.0)  # exponents; each side of 1 gets half of the draws
    plateau_beta: Range = (1.0, 2.0)
    final_sinc_probability: float = 0.8

    def __post_init__(self) -> None:
        """Check every field; ValueError names it, what was required and found."""
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        _check_range("kernel_px", self.kernel_px, 3, math.inf)
        for field in ("generalized_beta", "plateau_beta"):
            _check_range(field, getattr(self, field), 0.0, math.inf)
        for field in ("sinc_probability", "final_sinc_probability"):
            _check_fraction(field, getattr(self, field))


@dataclass(frozen=True, kw_only=True)
class LowRes:
    """The low-resolution input that goes with a picture."""

    factor: int  # times fewer pixels per side
    degradation: DegradationConfig = DegradationConfig()

    def __post_init__(self) -> None:
        """Raise ValueError for a factor that reduces nothing."""
        if self.factor < 2:
            raise ValueError(f"factor must be at least 2, got {self.factor}")


def degrade(picture_CHW: Picture, low_res: LowRes, generator: np.random.Generator) -> Picture:
    """Make the low-resolution picture, (3, H / factor, W / factor), rounded to 8 bits.

    A pure function of the picture and the generator's state.

    Args:
        picture_CHW: sides divisible by the factor.
        low_res: how.
        generator: of all random choices; `none` draws nothing.

    Raises:
        ValueError: the sides are not divisible.
    """
    height_px, width_px = picture_CHW.shape[1:]
    if height_px % low_res.factor or width_px % low_res.factor:
        raise ValueError(
            f"a picture must have sides divisible by {low_res.factor} to be reduced, "
            f"got {height_px} x {width_px}"
        )
    size = (height_px // low_res.factor, width_px // low_res.factor)
    if low_res.degradation.kind == "none":
        reduced = _resize(picture_CHW, size, "bicubic")
    else:
        reduced = _Degradation(low_res, generator).apply(picture_CHW, size)
    return np.round(reduced.clip(0, 1) * 255).astype(np.float32) / np.float32(255)


class _Degradation:
    """One random degradation, as its choices are drawn."""

    def __init__(self, low_res: LowRes, generator: np.random.Generator) -> None:
        self.config, self.generator = low_res.degradation, generator
        self.strength = low_res.factor / _PUBLISHED_FACTOR

    def apply(self, picture_CHW: Picture, size: tuple[int, int]) -> Picture:
        first, second = self.config.first, self.config.second
        smallest = min(1.0, first.resize_range[0] / self.strength)
        full = (picture_CHW.shape[1], picture_CHW.shape[2])
        picture_CHW = self._blur(picture_CHW, first)
        picture_CHW = self._resize(picture_CHW, first, full, smallest)
        picture_CHW = self._jpeg(self._noise(picture_CHW, first), first)
        picture_CHW = self._blur(picture_CHW, second)
        picture_CHW = self._resize(picture_CHW, second, size, second.resize_range[0])
        picture_CHW = self._noise(picture_CHW, second)
        if self._chance(0.5):
            return self._jpeg(self._reduce(picture_CHW, size), second)
        return self._reduce(self._jpeg(picture_CHW, second), size)

    def _reduce(self, picture_CHW: Picture, size: tuple[int, int]) -> Picture:
        """Bring to the final size and, mostly, let a sinc filter ring."""
        picture_CHW = _resize(picture_CHW, size, self._filter())
        if self._chance(self.config.final_sinc_probability):
            radius = self._radius(picture_CHW, 1.0)
            picture_CHW = convolve(
                picture_CHW, sinc_kernel(self._uniform((math.pi / 3, math.pi)), radius)
            )
        return picture_CHW

    def _blur(self, picture_CHW: Picture, one_pass: DegradationPass) -> Picture:
        if not self._chance(one_pass.blur_probability):
            return picture_CHW
        radius = self._radius(picture_CHW, self.strength)
        if self._chance(self.config.sinc_probability):
            # the published rule: large kernels may cut lower
            lowest = math.pi / (3 if 2 * radius + 1 < 13 * self.strength else 5)
            cutoff = self._uniform((min(lowest / self.strength, math.pi), math.pi))
            return convolve(picture_CHW, sinc_kernel(cutoff, radius))
        low, high = (self.strength * std for std in one_pass.blur_std_px)
        return convolve(picture_CHW, self._blur_kernel((low, high), radius))

    def _blur_kernel(self, std_px: Range, radius: int) -> Picture:
        form, is_isotropic, _ = _SHAPES[self.generator.choice(len(_SHAPES), p=_SHARES)]
        stds = (std := self._uniform(std_px), std if is_isotropic else self._uniform(std_px))
        angle = 0.0 if is_isotropic else self._uniform((-math.pi, math.pi))
        beta = 1.0
        if form != "gaussian":
            low, high = getattr(self.config, f"{form}_beta")
            middle = min(max(low, 1.0), high)
            beta = self._uniform((low, middle) if self._chance(0.5) else (middle, high))
        return blur_kernel(stds, angle, radius, beta=beta, plateau=form == "plateau")

    def _radius(self, picture_CHW: Picture, strength: float) -> int:
        """Radius of a kernel that fits the picture; 0 for a picture under three pixels."""
        smallest, largest = (
            max(1, round(strength * (side - 1) / 2)) for side in self.config.kernel_px
        )
        radius = int(self.generator.integers(smallest, largest + 1))
        return min(radius, (min(picture_CHW.shape[1:]) - 1) // 2)

    def _resize(
        self, picture_CHW: Picture, one_pass: DegradationPass, whole: tuple[int, int], low: float
    ) -> Picture:
        """Resize to a random part, or multiple, of `whole`."""
        direction = self.generator.choice(3, p=one_pass.resize_probabilities)
        ranges = ((1.0, one_pass.resize_range[1]), (low, 1.0), (1.0, 1.0))
        scale = self._uniform(ranges[direction])
        size = (max(1, round(scale * whole[0])), max(1, round(scale * whole[1])))
        return _resize(picture_CHW, size, self._filter())

    def _filter(self) -> str:
        return ("area", "bilinear", "bicubic")[self.generator.integers(3)]

    def _noise(self, picture_CHW: Picture, one_pass: DegradationPass) -> Picture:
        is_gaussian = self._chance(one_pass.gaussian_probability)
        is_grey = self._chance(one_pass.grey_probability)
        if is_gaussian:
            shape = (1, *picture_CHW.shape[1:]) if is_grey else picture_CHW.shape
            std = self._uniform(one_pass.gaussian_std_8bit) / 255
            noise = std * self.generator.standard_normal(shape, dtype=np.float32)
        else:
            scale = self._uniform(one_pass.poisson_scale)
            noise = scale * _poisson_noise(_grey(picture_CHW) if is_grey else picture_CHW, self)
        return (picture_CHW + noise.astype(np.float32)).clip(0, 1)

    def _jpeg(self, picture_CHW: Picture, one_pass: DegradationPass) -> Picture:
        from PIL import Image

        quality = int(self._uniform(one_pass.jpeg_quality))
        pixels_HWC = np.round(picture_CHW.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
        stream = BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels_HWC)).save(
            stream, format="JPEG", quality=quality
        )
        return _from_8bit(np.asarray(Image.open(stream, formats=("JPEG",))).transpose(2, 0, 1))

    def _chance(self, probability: float) -> bool:
        return bool(self.generator.random() < probability)

    def _uniform(self, ends: Range) -> float:
        return float(self.generator.uniform(*ends))


def _resize(picture_CHW: Picture, size: tuple[int, int], kind: str) -> Picture:
    """Resize to (height, width), antialiased where it shrinks."""
    from PIL import Image

    if picture_CHW.shape[1:] == size:
        return picture_CHW
    filters = {
        "area": Image.Resampling.BOX,
        "bilinear": Image.Resampling.BILINEAR,
        "bicubic": Image.Resampling.BICUBIC,
    }
    channels = [
        np.asarray(Image.fromarray(channel_HW).resize(size[::-1], filters[kind]))
        for channel_HW in np.ascontiguousarray(picture_CHW)
    ]
    return np.stack(channels)


def _grey(picture_CHW: Picture) -> Picture:
    weights_C = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # Rec. 601 luma
    return np.tensordot(weights_C, picture_CHW, axes=1)[None]


def _poisson_noise(picture_CHW: Picture, degradation: _Degradation) -> Picture:
    """Photon noise, of as many levels as the picture has, rounded up to a power of two."""
    levels = np.round(picture_CHW.clip(0, 1) * 255) / 255
    num_levels = int(np.count_nonzero(np.bincount((levels * 255).astype(np.uint8).ravel())))
    num_photons = 2 ** math.ceil(math.log2(max(num_levels, 2)))
    drawn = degradation.generator.poisson(levels * num_photons) / num_photons
    return (drawn - levels).astype(np.float32)


def _from_8bit(pixels: NDArray[np.uint8]) -> Picture:
    return pixels.astype(np.float32) / np.float32(255)
