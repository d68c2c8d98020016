"""Logistic regression: it separates what can be separated, and is a function of the data."""

import numpy as np
import pytest

from pipelines.stages.evaluation.classifier import fit_classifier


def clouds(num: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Three Gaussian clouds in 20 dimensions of very different scales."""
    generator = np.random.default_rng(seed)
    labels = [("flat", "inked", "shaded")[index % 3] for index in range(num)]
    centres = {"flat": 0.0, "inked": 4.0, "shaded": 8.0}
    x = generator.standard_normal((num, 20)) + np.array([centres[one] for one in labels])[:, None]
    return x * np.logspace(-3, 3, 20), labels


def test_clouds_are_told_apart() -> None:
    """New members of well separated classes are named, whatever the scale of the features."""
    classify = fit_classifier(*clouds(60, 0))
    x, labels = clouds(300, 1)
    assert classify.classes == ("flat", "inked", "shaded")
    assert np.mean([one == other for one, other in zip(classify(x), labels)]) > 0.98


def test_features_that_say_nothing_leave_chance() -> None:
    """Labels without a cause are not recognised on new pictures."""
    generator = np.random.default_rng(0)
    labels = [str(label) for label in generator.integers(0, 3, 1200)]
    x = generator.standard_normal((1200, 5))
    found = fit_classifier(x[:600], labels[:600])(x[600:])
    assert abs(np.mean([one == other for one, other in zip(found, labels[600:])]) - 1 / 3) < 0.08


def test_the_fit_is_the_minimum() -> None:
    """The gradient of the penalised cross-entropy vanishes, in whatever order pictures come."""
    x, labels = clouds(60, 0)
    classify, shuffled = fit_classifier(x, labels), fit_classifier(x[::-1], labels[::-1])
    np.testing.assert_allclose(classify.weight_DK, shuffled.weight_DK, atol=1e-4)
    standard = (x - classify.mean_D) / classify.scale_D
    scores = standard @ classify.weight_DK + classify.bias_K
    p = np.exp(scores - scores.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    target = np.array([[one == name for name in classify.classes] for one in labels])
    gradient = standard.T @ (p - target) / len(x) + 2e-2 * classify.weight_DK
    assert np.abs(gradient).max() < 1e-4


def test_a_constant_feature_is_harmless_and_one_class_is_refused() -> None:
    """A feature without spread divides by nothing; a single style cannot be classified."""
    x, labels = clouds(30, 0)
    x[:, 3] = 7.0
    assert fit_classifier(x, labels)(x) == labels
    with pytest.raises(ValueError, match="two classes at least, got 30 of"):
        fit_classifier(x, ["one"] * 30)
