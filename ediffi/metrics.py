"""Distances between sets of pictures and text alignment, with intervals by bootstrap.

eDiff-I section 6 reports zero-shot FID and CLIP score. The Fréchet and kernel distances here take
features of any extractor (`ediffi.features`), so their values compare only within one extractor:
those of EfficientNet-Lite0 or of a CLIP are not the FID of papers, which uses Inception-v3.

Shape legend: N samples, D features, R resamplings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

DistanceKind = Literal["frechet", "kernel"]
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Resampled:
    """A figure and its values on resampled pictures, for intervals and paired differences."""

    value: float
    replicates_R: Array

    def __sub__(self, other: Resampled) -> Resampled:
        """Difference of two figures of equal resamplings: what both share cancels."""
        return Resampled(self.value - other.value, self.replicates_R - other.replicates_R)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Quantiles of the replicates."""
        low, high = np.quantile(self.replicates_R, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def to_json(self) -> dict[str, float]:
        """The value with its 95 % interval."""
        low, high = self.interval()
        return {"value": self.value, "low": low, "high": high}


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
    return _frechet(a_ND, b_ND)(np.ones(len(a_ND)), np.ones(len(b_ND)))


def kernel_distance(features_a_ND: ArrayLike, features_b_ND: ArrayLike) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, as in KID.

    Unlike the Fréchet distance its expectation does not depend on N; it may be negative.

    Raises:
        ValueError: as for `frechet_distance`.
    """
    a_ND, b_ND = _feature_sets(features_a_ND, features_b_ND)
    return _kernel(a_ND, b_ND)(np.ones(len(a_ND)), np.ones(len(b_ND)))


def resampled_distance(
    features_ND: ArrayLike,
    real_ND: ArrayLike,
    *,
    kind: DistanceKind,
    seed: int,
    num: int = 200,
) -> Resampled:
    """A distance with a bootstrap over the pictures of both sets.

    It covers which pictures happened to be drawn and which to be held out. It does not cover the
    chance in training, nor the bias that a Fréchet distance of few pictures has. That bias grows
    in resampled sets, which have fewer distinct pictures, so their distances lie above the value:
    replicates are shifted to have it as their mean.

    Args:
        features_ND: of drawn pictures.
        real_ND: of real ones.
        kind: which distance.
        seed: with it and the sizes of the sets, the resamplings are fixed: those of two models
            drawing for equal captions and seeds are paired, and may be subtracted.
        num: resamplings, positive.

    Raises:
        ValueError: as for `frechet_distance`, or `num` is not positive.
    """
    a_ND, b_ND = _feature_sets(features_ND, real_ND)
    if num < 1:
        raise ValueError(f"num must be positive, got {num}")
    distance = {"frechet": _frechet, "kernel": _kernel}[kind](a_ND, b_ND)
    generator = np.random.default_rng(seed)
    replicates = []
    for _ in range(num):
        counts_a, counts_b = (
            generator.multinomial(size, np.full(size, 1 / size)).astype(np.float64)
            for size in (len(a_ND), len(b_ND))
        )
        replicates.append(distance(counts_a, counts_b))
    value, raw_R = distance(np.ones(len(a_ND)), np.ones(len(b_ND))), np.array(replicates)
    return Resampled(value, raw_R - raw_R.mean() + value)


def _frechet(a_ND: Array, b_ND: Array) -> Callable[[Array, Array], float]:
    """The distance as a function of how often each row counts."""

    def distance(counts_a_N: Array, counts_b_N: Array) -> float:
        (mean_a, root_a), (mean_b, root_b) = (
            _gaussian(a_ND, counts_a_N),
            _gaussian(b_ND, counts_b_N),
        )
        fidelity = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
        total = np.square(mean_a - mean_b).sum() + np.square(root_a).sum()
        total += np.square(root_b).sum() - 2 * fidelity
        return max(0.0, float(total))  # equal sets round to some -1e-12

    return distance


def _gaussian(features_ND: Array, counts_N: Array) -> tuple[Array, Array]:
    """Mean (D,), and R with at most D rows and R^T R the unbiased covariance."""
    here_N = counts_N > 0
    rows_ND, counts_N = features_ND[here_N], counts_N[here_N]
    num = counts_N.sum()
    mean_D = counts_N @ rows_ND / num
    root_ND = np.sqrt(counts_N / (num - 1))[:, None] * (rows_ND - mean_D)
    if len(root_ND) > root_ND.shape[1]:
        root_ND = np.linalg.qr(root_ND, mode="r")
    return mean_D, root_ND


def _kernel(a_ND: Array, b_ND: Array) -> Callable[[Array, Array], float]:
    """The distance as a function of how often each row counts; a row makes no pair with itself."""
    k_aa, k_bb, k_ab = (
        (x @ y.T / x.shape[1] + 1.0) ** 3 for x, y in ((a_ND, a_ND), (b_ND, b_ND), (a_ND, b_ND))
    )

    def mean_of_pairs(k_NN: Array, counts_N: Array) -> float:
        pairs = np.square(counts_N.sum()) - np.square(counts_N).sum()
        if pairs == 0:  # one picture, over and over
            return float(counts_N @ np.diag(k_NN) / counts_N.sum())
        total = counts_N @ k_NN @ counts_N - np.square(counts_N) @ np.diag(k_NN)
        return float(total / pairs)

    def distance(counts_a_N: Array, counts_b_N: Array) -> float:
        across = counts_a_N @ k_ab @ counts_b_N / (counts_a_N.sum() * counts_b_N.sum())
        return (
            mean_of_pairs(k_aa, counts_a_N) + mean_of_pairs(k_bb, counts_b_N) - 2.0 * float(across)
        )

    return distance


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


def resampled_mean(values: ArrayLike, *, seed: int, num: int = 1000) -> Resampled:
    """The mean of `values` with a bootstrap over them; equal seeds and sizes are paired.

    Raises:
        ValueError: `values` is empty or `num` is not positive.
    """
    values_N = np.asarray(values, dtype=np.float64).reshape(-1)
    if len(values_N) == 0:
        raise ValueError("values must hold at least one number, got none")
    if num < 1:
        raise ValueError(f"num must be positive, got {num}")
    generator = np.random.default_rng(seed)
    means = [generator.choice(values_N, len(values_N)).mean() for _ in range(num)]
    return Resampled(float(values_N.mean()), np.array(means))


def bootstrap_interval(
    values: ArrayLike, *, seed: int, num: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, from `num` resamplings.

    Raises:
        ValueError: `values` is empty, `num` is not positive or `level` is not inside (0, 1).
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie inside (0, 1), got {level}")
    return resampled_mean(values, seed=seed, num=num).interval(level)


def _feature_sets(a: ArrayLike, b: ArrayLike, *, min_rows: int = 2) -> tuple[Array, Array]:
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
