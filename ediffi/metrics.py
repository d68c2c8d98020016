"""Distances between sets of pictures, text alignment, and the features both are computed on.

eDiff-I section 6 reports zero-shot FID and CLIP score. The Fréchet and kernel distances here take
features of any extractor, so their values compare only within one extractor: those of
EfficientNet-Lite0 or of a CLIP are not the FID of papers, which uses Inception-v3.

Shape legend: B batch, C H W, N samples, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ediffi.encoding.encoder_weights import (
    EncoderConfig,
    package_file,
    path_digest,
    weights_identity,
)

if TYPE_CHECKING:
    from torch import Tensor

_BATCH_IMAGES = 64


# --- Distances ------------------------------------------------------------------------------------


def frechet_distance(features_a_ND: ArrayLike, features_b_ND: ArrayLike) -> float:
    """Fréchet distance between the Gaussians fitted to two sets of features.

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), with unbiased covariances. Writing
    C = R^T R, the last trace is the sum of the singular values of R_a R_b^T: no matrix square
    root, hence exact also when there are fewer samples than features.

    Args:
        features_a_ND: (N, D), at least two rows; the other set may have another N.

    Raises:
        ValueError: a set has fewer than two rows or values that are not finite, or widths differ.
    """
    a_ND, b_ND = _feature_sets(features_a_ND, features_b_ND)
    mean_distance = np.square(a_ND.mean(0) - b_ND.mean(0)).sum()
    root_a, root_b = _covariance_root(a_ND), _covariance_root(b_ND)
    fidelity = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    distance = mean_distance + np.square(root_a).sum() + np.square(root_b).sum() - 2 * fidelity
    return max(0.0, float(distance))  # equal sets round to some -1e-12


def kernel_distance(features_a_ND: ArrayLike, features_b_ND: ArrayLike) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, as in KID.

    Unlike the Fréchet distance its expectation does not depend on N; it may be negative.

    Raises:
        ValueError: as for `frechet_distance`.
    """
    a_ND, b_ND = _feature_sets(features_a_ND, features_b_ND)

    def kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        return (x @ y.T / x.shape[1] + 1.0) ** 3

    def mean_of_pairs(x: NDArray[np.float64]) -> float:
        k_NN = kernel(x, x)
        return float((k_NN.sum() - np.trace(k_NN)) / (len(x) * (len(x) - 1)))

    return mean_of_pairs(a_ND) + mean_of_pairs(b_ND) - 2.0 * float(kernel(a_ND, b_ND).mean())


def clip_scores(image_features_ND: ArrayLike, text_features_ND: ArrayLike) -> NDArray[np.float64]:
    """100 times the cosine between each picture and its own caption, (N,).

    Raises:
        ValueError: the shapes differ, or values are not finite.
    """
    image_ND, text_ND = _feature_sets(image_features_ND, text_features_ND, min_rows=1)
    if len(image_ND) != len(text_ND):
        raise ValueError(
            f"text_features must have one row per picture ({len(image_ND)}), got {len(text_ND)}"
        )
    norms_N = np.linalg.norm(image_ND, axis=1) * np.linalg.norm(text_ND, axis=1)
    return 100.0 * (image_ND * text_ND).sum(1) / np.maximum(norms_N, np.finfo(np.float64).tiny)


def clip_score(image_features_ND: ArrayLike, text_features_ND: ArrayLike) -> float:
    """Mean of `clip_scores`; higher is better aligned."""
    return float(clip_scores(image_features_ND, text_features_ND).mean())


def bootstrap_interval(
    values: ArrayLike, *, seed: int, num: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, from `num` resamplings.

    Raises:
        ValueError: `values` is empty, `num` is not positive or `level` is not inside (0, 1).
    """
    values_N = np.asarray(values, dtype=np.float64).reshape(-1)
    if len(values_N) == 0:
        raise ValueError("values must hold at least one number, got none")
    if num < 1 or not 0.0 < level < 1.0:
        raise ValueError(f"num must be positive and level inside (0, 1), got {num} and {level}")
    generator = np.random.default_rng(seed)
    means = [generator.choice(values_N, len(values_N)).mean() for _ in range(num)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _covariance_root(features_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    """R, at most (D, D), with R^T R the unbiased covariance."""
    centred_ND = features_ND - features_ND.mean(0)
    return np.linalg.qr(centred_ND, mode="r") / np.sqrt(len(features_ND) - 1)


def _feature_sets(
    a: ArrayLike, b: ArrayLike, *, min_rows: int = 2
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a_ND, b_ND = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    for features in (a_ND, b_ND):
        if features.ndim != 2 or len(features) < min_rows:
            raise ValueError(
                f"features must be (N, D) with at least {min_rows} rows, got {features.shape}"
            )
        if not np.isfinite(features).all():
            raise ValueError("features must be finite, got nan or inf: look at the pictures first")
    if a_ND.shape[1] != b_ND.shape[1]:
        raise ValueError(
            f"features must have one width, got {a_ND.shape[1]} and {b_ND.shape[1]}: "
            "use one extractor for both sets"
        )
    return a_ND, b_ND


# --- Feature extractors ---------------------------------------------------------------------------


class FeatureExtractor(Protocol):
    """Maps uint8 pictures (B, 3, H, W) to float32 features (B, D) on the CPU."""

    def __call__(self, pictures_BCHW: Tensor) -> Tensor:
        """Extract features; raises ValueError unless pictures are uint8 with three channels."""


class ClipFeatures:
    """Normalised image embeddings of a CLIP."""

    def __init__(self, encoder: EncoderConfig, *, device: str = "cpu") -> None:
        """Load the encoder; raises ValueError when it is not an image encoder or is missing."""
        from dataclasses import replace

        from ediffi.encoders import load_encoder

        if encoder.family != "open_clip_image":
            raise ValueError(f"encoder.family must be open_clip_image, got {encoder.family!r}")
        self._encoder = load_encoder(replace(encoder, storage_dtype="fp32"), device=device)

    def __call__(self, pictures_BCHW: Tensor) -> Tensor:
        """Encode pictures through the very transform that the embedding cache uses."""
        import torch
        from PIL import Image

        _check_pictures(pictures_BCHW)
        pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pictures_BCHW.cpu()]
        return torch.stack([sample["pooled"] for sample in self._encoder.encode(pictures)])


class TimmFeatures:
    """Globally pooled features of a timm classifier, 1280 wide for EfficientNet-Lite0.

    Pictures are resized to `image_px` (bicubic, antialiased) and mapped to (x - 127) / 128.
    """

    def __init__(
        self, model: str, weights: str, *, image_px: int = 224, device: str = "cpu"
    ) -> None:
        """Load the weights, all of them; ValueError when they are missing or do not fit."""
        import timm
        import torch

        if model not in timm.list_models():
            raise ValueError(f"model must be a timm architecture, got {model!r}")
        if image_px < 32:
            raise ValueError(f"image_px must be at least 32 (the stride), got {image_px}")
        network = timm.create_model(model, pretrained=False)
        path = _timm_weights(weights)
        state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(_with_names_of(network.state_dict(), state, f"{path} for {model}"))
        network.reset_classifier(0)
        self._network = network.to(device).eval().requires_grad_(False)
        self._image_px = image_px
        self._device = device

    def __call__(self, pictures_BCHW: Tensor) -> Tensor:
        """Extract features of uint8 pictures of any size."""
        import torch

        _check_pictures(pictures_BCHW)
        with torch.inference_mode():
            features = [self._features(batch) for batch in pictures_BCHW.split(_BATCH_IMAGES)]
        return torch.cat(features)

    def _features(self, pictures_BCHW: Tensor) -> Tensor:
        from torch.nn import functional as F

        size = (self._image_px, self._image_px)
        x_BCHW = pictures_BCHW.to(self._device).float()
        x_BCHW = F.interpolate(x_BCHW, size, mode="bicubic", antialias=True).clamp(0, 255)
        return self._network((x_BCHW - 127.0) / 128.0).float().cpu()


def feature_extractor(config: Mapping[str, Any], *, device: str = "cpu") -> FeatureExtractor:
    """Build an extractor from a recipe's mapping.

    Args:
        config: {"kind": "clip", "encoder": EncoderConfig} or
            {"kind": "timm", "model": name, "weights": "package:MODULE" or path} and optionally
            "image_px".

    Raises:
        ValueError: unknown kind, missing or unknown keys, or weights that cannot be had.
    """
    _check_extractor(config)
    options = {key: value for key, value in config.items() if key != "kind"}
    if config["kind"] == "clip":
        return ClipFeatures(**options, device=device)
    return TimmFeatures(**options, device=device)


def extractor_identity(config: Mapping[str, Any]) -> dict[str, str]:
    """Say which weights an extractor uses, for fingerprints; imports no torch."""
    _check_extractor(config)
    if config["kind"] == "clip":
        return weights_identity(config["encoder"])
    return {"sha256": path_digest(_timm_weights(config["weights"]))}


def _check_extractor(config: Mapping[str, Any]) -> None:
    required = {"clip": {"encoder"}, "timm": {"model", "weights"}}
    optional = {"clip": set[str](), "timm": {"image_px"}}
    kind = config.get("kind")
    if kind not in required:
        raise ValueError(f"kind must be one of clip, timm, got {kind!r}")
    keys = config.keys() - {"kind"}
    if not required[kind] <= keys <= required[kind] | optional[kind]:
        raise ValueError(
            f"a {kind} extractor must have {sorted(required[kind])} and may have "
            f"{sorted(optional[kind])}, got {sorted(keys)}"
        )


def _timm_weights(weights: str) -> Path:
    if weights.startswith("package:"):
        return package_file(weights.removeprefix("package:"), "*.pth")
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ValueError(f"weights must be a file or package:MODULE, found no file at {path}")
    return path


def _with_names_of(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str
) -> dict[str, Tensor]:
    """Rename tensors in order: the packaged weights carry the names of another EfficientNet port.

    Both ports list the layers as the picture passes them; every shape and every last part of a
    name (weight, running_mean, ...) must agree.
    """
    ours, theirs = ([(k.split(".")[-1], v.shape) for k, v in s.items()] for s in (own, state))
    if ours != theirs:
        raise ValueError(
            f"weights must hold the {len(ours)} tensors of the model, found {len(theirs)} with "
            f"other shapes in {what}: take model and weights from one release"
        )
    return dict(zip(own, state.values()))


def _check_pictures(pictures_BCHW: Tensor) -> None:
    import torch

    shape = tuple(pictures_BCHW.shape)
    if pictures_BCHW.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3:
        raise ValueError(
            f"pictures must be uint8 (B, 3, H, W), got {pictures_BCHW.dtype} {shape}: "
            "scale to 0..255 and round first"
        )
