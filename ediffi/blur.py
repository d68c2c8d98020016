"""Blur and sinc kernels, after Real-ESRGAN (arXiv 2107.10833, section 3), and filtering with them.

Shapes: C = 3 (RGB), H W picture, K kernel.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.float32]


def blur_kernel(
    stds_px: tuple[float, float],
    angle: float,
    radius: int,
    *,
    beta: float = 1.0,
    plateau: bool = False,
) -> Picture:
    """Return a blur of unit sum, (2 radius + 1) squared, widest along `angle`.

    With d the squared distance in standard deviations: exp(-d^beta / 2), Gaussian at beta 1, or
    1 / (1 + d^beta), a plateau (arXiv 2107.10833, equation 2).
    """
    y_KK, x_KK = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float64)
    along = (math.cos(angle) * x_KK + math.sin(angle) * y_KK) / stds_px[0]
    across = (math.cos(angle) * y_KK - math.sin(angle) * x_KK) / stds_px[1]
    powered = (along**2 + across**2) ** beta
    kernel_KK = 1 / (1 + powered) if plateau else np.exp(-powered / 2)
    return (kernel_KK / kernel_KK.sum()).astype(np.float32)


def sinc_kernel(cutoff: float, radius: int) -> Picture:
    """Return the circular low-pass filter of unit sum that ends at `cutoff` radians a pixel.

    cutoff J1(cutoff r) / (2 pi r), and cutoff^2 / (4 pi) at r = 0 (arXiv 2107.10833, equation 6).
    """
    y_KK, x_KK = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float64)
    r_KK = np.hypot(x_KK, y_KK)
    safe_KK = np.where(r_KK == 0, 1, r_KK)
    kernel_KK = cutoff * bessel_j1(cutoff * safe_KK) / (2 * math.pi * safe_KK)
    kernel_KK[radius, radius] = cutoff**2 / (4 * math.pi)
    return (kernel_KK / kernel_KK.sum()).astype(np.float32)


def bessel_j1(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bessel function J1 as the mean of cos(t - x sin t) over half a turn: exact to |x| = 100."""
    t = (np.arange(128) + 0.5) * (math.pi / 128)
    mean: NDArray[np.float64] = np.cos(t - x[..., None] * np.sin(t)).mean(axis=-1)
    return mean


def convolve(picture_CHW: Picture, kernel_KK: Picture) -> Picture:
    """Filter a picture, reflected at its borders, with a kernel that is its own half-turn."""
    radius = len(kernel_KK) // 2
    if radius == 0:
        return picture_CHW
    padded = np.pad(picture_CHW, ((0, 0), (radius, radius), (radius, radius)), mode="reflect")
    size = padded.shape[1:]
    spectrum = np.fft.rfft2(padded) * np.fft.rfft2(kernel_KK, s=size)
    filtered = np.fft.irfft2(spectrum, s=size)[:, 2 * radius :, 2 * radius :]
    return filtered.astype(np.float32, copy=False)
