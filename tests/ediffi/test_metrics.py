"""Metrics against closed forms."""

import numpy as np
import pytest
import torch

from ediffi.metrics import (
    bootstrap_interval,
    clip_score,
    clip_scores,
    frechet_distance,
    kernel_distance,
    resampled_distance,
    resampled_mean,
)


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


def resamplings(sizes: tuple[int, int], seed: int, num: int) -> list[tuple[np.ndarray, ...]]:
    """How often each row counts in the resamplings that a seed stands for."""
    generator = np.random.default_rng(seed)
    return [tuple(generator.multinomial(n, np.full(n, 1 / n)) for n in sizes) for _ in range(num)]


@pytest.mark.parametrize("width", [3, 40])
def test_resampled_frechet_distance_is_that_of_repeated_rows(width):
    """Weighting rows is exactly drawing them several times, with few and with many features."""
    a, b = (np.random.default_rng(i).standard_normal((n, width)) for i, n in enumerate((12, 9)))
    found = resampled_distance(a, b, kind="frechet", seed=5, num=4)
    assert found.value == frechet_distance(a, b)
    expected = [
        frechet_distance(np.repeat(a, counts_a, axis=0), np.repeat(b, counts_b, axis=0))
        for counts_a, counts_b in resamplings((12, 9), 5, 4)
    ]
    assert found.replicates_R == pytest.approx(expected - np.mean(expected) + found.value)


def test_resampled_kernel_distance_pairs_no_picture_with_itself():
    """A picture drawn twice is no pair of equal pictures: that would be a bias towards 1."""
    a, b = np.random.default_rng(0).standard_normal((2, 5, 3))

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    def within(x, counts):
        pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
        weights = [counts[i] * counts[j] for i, j in pairs]
        return np.average([k(x[i], x[j]) for i, j in pairs], weights=weights)

    found = resampled_distance(a, b, kind="kernel", seed=1, num=3)
    assert found.value == kernel_distance(a, b)
    expected = []
    for counts_a, counts_b in resamplings((5, 5), 1, 3):
        weights = np.outer(counts_a, counts_b)
        across = np.average([[k(x, y) for y in b] for x in a], weights=weights)
        expected.append(within(a, counts_a) + within(b, counts_b) - 2 * across)
    assert found.replicates_R == pytest.approx(expected - np.mean(expected) + found.value)


@pytest.mark.parametrize("kind", ["frechet", "kernel"])
def test_intervals_are_as_wide_as_distances_vary(kind):
    """The bootstrap of one pair of sets foresees how distances of other pairs scatter."""
    generator = np.random.default_rng(0)

    def pair():
        return generator.standard_normal((80, 2)), generator.standard_normal((80, 2)) + 1.0

    distance = {"frechet": frechet_distance, "kernel": kernel_distance}[kind]
    truth = np.std([distance(*pair()) for _ in range(300)])
    found = [resampled_distance(*pair(), kind=kind, seed=i, num=60) for i in range(40)]
    assert np.mean([one.replicates_R.std() for one in found]) == pytest.approx(truth, rel=0.25)
    low, high = found[0].interval()
    assert low < found[0].value < high


def test_the_interval_of_few_pictures_holds_the_estimate():
    """Resampled sets are poorer in pictures and further away; the interval is shifted back."""
    a, b = np.random.default_rng(0).standard_normal((2, 30, 50))
    found = resampled_distance(a, b, kind="frechet", seed=0, num=50)
    for counts_a, counts_b in resamplings((30, 30), 0, 10):
        poorer = frechet_distance(np.repeat(a, counts_a, axis=0), np.repeat(b, counts_b, axis=0))
        assert poorer > found.value
    assert found.to_json()["low"] < found.value < found.to_json()["high"]


def test_differences_of_paired_sets_are_sharper():
    """What two models share cancels: equal drawings differ by nothing, a shift by its own."""
    generator = np.random.default_rng(0)
    real, drawn = generator.standard_normal((2, 60, 4))
    first, same, other = (
        resampled_distance(x, real, kind="frechet", seed=2, num=60)
        for x in (drawn, drawn.copy(), drawn + 0.01)
    )
    assert (first - same).to_json() == {"value": 0.0, "low": 0.0, "high": 0.0}
    difference, alone = (other - first).interval(), first.interval()
    assert difference[1] - difference[0] < 0.1 * (alone[1] - alone[0])


def test_means_are_resampled_in_pairs():
    """A constant added to every value moves the mean by it, without doubt."""
    values = np.random.default_rng(0).standard_normal(50)
    first, second = (resampled_mean(x, seed=1, num=40) for x in (values, values + 2.0))
    assert first.value == pytest.approx(values.mean())
    assert (second - first).interval() == pytest.approx((2.0, 2.0))
    assert first.interval() != resampled_mean(values, seed=2, num=40).interval()
    assert first.interval() == bootstrap_interval(values, seed=1, num=40)


def test_shares_stay_shares():
    """The interval of a mean of zeros and ones never leaves [0, 1]."""
    low, high = resampled_mean([0.0] * 20 + [1.0], seed=0).interval()
    assert 0 <= low < 1 / 21 < high <= 1


def test_resampling_needs_resamplings():
    """None at all has no interval."""
    with pytest.raises(ValueError, match="num must be positive, got 0"):
        resampled_distance(np.eye(3), np.eye(3), kind="frechet", seed=0, num=0)
    with pytest.raises(ValueError, match="num must be positive, got 0"):
        resampled_mean([1.0], seed=0, num=0)
