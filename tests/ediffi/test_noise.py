"""Tests of ediffi.noise: closed forms of the log-normal, interval edges and tiling."""

import itertools
import math
import re
from statistics import NormalDist

import numpy as np
import pytest
import torch

from ediffi.noise import (
    WHOLE,
    NoiseInterval,
    SigmaDistribution,
    ancestors,
    check_tiling,
    paper_intervals,
    tree_node,
)

PAPER = SigmaDistribution()


def next_float32(value: float, steps: int = 1) -> float:
    """Float32 value `steps` above `value`."""
    result = np.float32(value)
    for _ in range(steps):
        result = np.nextafter(result, np.float32(np.inf))
    return float(result)


def test_quantile_and_cdf_are_inverse_of_each_other():
    """The quantile of the cdf is the noise level itself, at every noise level that is used."""
    for sigma in (0.002, 0.0757, 0.301, 1.0, 9.61, 80.0):
        assert PAPER.quantile(PAPER.cdf(sigma)) == pytest.approx(sigma, rel=1e-6)
        assert PAPER.cdf(sigma) + PAPER.survival(sigma) == pytest.approx(1.0, abs=1e-15)


def test_median_is_exp_of_log_mean_and_ends_are_open():
    """Half the probability lies below exp(log_mean); the ends of the axis are 0 and infinity."""
    assert PAPER.quantile(0.5) == pytest.approx(math.exp(-1.2))
    assert PAPER.quantile(0.0) == 0.0
    assert PAPER.quantile(1.0) == math.inf
    assert (PAPER.cdf(0.0), PAPER.survival(0.0)) == (0.0, 1.0)
    assert (PAPER.cdf(math.inf), PAPER.survival(math.inf)) == (1.0, 0.0)


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan])
def test_quantile_refuses_what_is_no_probability(q):
    """Only values in [0, 1] have a quantile."""
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        PAPER.quantile(q)


@pytest.mark.parametrize(
    "fields", [{"log_std": 0.0}, {"log_std": math.nan}, {"log_mean": math.inf}]
)
def test_distribution_refuses_impossible_parameters(fields):
    """The error names the field at fault."""
    with pytest.raises(ValueError, match=next(iter(fields))):
        SigmaDistribution(**fields)


def test_paper_edges_match_the_published_split():
    """E^3_0 ends at 0.0757, E^9_511 begins at 9.610, and the middle holds 87.30 % of the mass."""
    intervals = paper_intervals(PAPER)
    assert list(intervals) == ["low", "middle", "high"]
    assert intervals["low"].sigma_max == pytest.approx(0.0757, abs=5e-5)
    assert intervals["high"].sigma_min == pytest.approx(9.610, abs=5e-4)
    assert intervals["middle"].mass(PAPER) == pytest.approx(0.8730, abs=5e-5)
    check_tiling(intervals)


def test_rightmost_nodes_begin_at_the_tabulated_levels():
    """Right-most nodes of levels 1 to 8 begin where the closed form says."""
    table = [0.301, 0.677, 1.198, 1.898, 2.816, 3.993, 5.480, 7.331]
    found = [tree_node(level, 2**level - 1, PAPER).sigma_min for level in range(1, 9)]
    assert found == pytest.approx(table, abs=6e-4)


@pytest.mark.parametrize("level", [0, 1, 3, 9])
def test_every_level_of_the_tree_tiles_with_equal_mass(level):
    """The 2^l nodes of a level share their edges exactly and have probability 2^-l each."""
    nodes = {str(index): tree_node(level, index, PAPER) for index in range(2**level)}
    check_tiling(nodes)
    for node in nodes.values():
        assert node.mass(PAPER) == pytest.approx(2.0**-level, rel=1e-9)


def test_children_cover_their_parent_exactly():
    """Nodes 2i and 2i + 1 of the next level begin, meet and end on the parent's own edges."""
    parent = tree_node(4, 11, PAPER)
    left, right = tree_node(5, 22, PAPER), tree_node(5, 23, PAPER)
    assert (left.sigma_min, right.sigma_max) == (parent.sigma_min, parent.sigma_max)
    assert left.sigma_max == right.sigma_min


@pytest.mark.parametrize(("level", "index"), [(-1, 0), (3, 8), (3, -1)])
def test_tree_node_refuses_nodes_that_do_not_exist(level, index):
    """Level l has the nodes 0 to 2^l - 1 only."""
    with pytest.raises(ValueError, match="2\\^level"):
        tree_node(level, index, PAPER)


def test_the_papers_experts_grow_through_the_outer_nodes():
    """E^3_0 has two ancestors, E^9_511 eight; the complement, across the median, has none."""
    experts = paper_intervals(PAPER)
    assert list(ancestors(experts["low"], PAPER)) == ["E1_0", "E2_0"]
    assert list(ancestors(experts["high"], PAPER)) == [f"E{n}_{2**n - 1}" for n in range(1, 9)]
    assert ancestors(experts["middle"], PAPER) == {}
    assert ancestors(WHOLE, PAPER) == {}


def test_an_interval_covers_what_lies_inside_it():
    """Itself and its parts; edges count, overlaps do not."""
    assert WHOLE.covers(NoiseInterval(0.5))
    assert NoiseInterval(0.5, 2.0).covers(NoiseInterval(0.5, 2.0))
    assert not NoiseInterval(0.5, 2.0).covers(NoiseInterval(1.0, 2.1))
    assert not NoiseInterval(0.5, 2.0).covers(NoiseInterval(0.4, 1.0))


def test_ancestors_of_any_interval_are_nested_nodes_around_it():
    """Each is a node of its level, inside the one before; no node of a deeper level holds it."""
    generator = np.random.default_rng(0)
    edges = np.sort(PAPER.log_mean + 2.5 * generator.standard_normal((50, 2)), axis=1)
    for low, high in np.exp(edges).tolist():
        interval, before = NoiseInterval(low, high), WHOLE
        nodes = ancestors(interval, PAPER)
        for level, (name, node) in enumerate(nodes.items(), start=1):
            index = int(name.removeprefix(f"E{level}_"))
            assert node == tree_node(level, index, PAPER)
            assert node.covers(interval)
            assert before.covers(node)
            before = node
        level = len(nodes) + 1
        if level < 12:
            below = [tree_node(level, index, PAPER) for index in range(2**level)]
            assert not any(node.covers(interval) for node in below)


@pytest.mark.parametrize(
    "interval",
    [NoiseInterval(1e6), NoiseInterval(0.0, 1e-15), NoiseInterval(1.0, next_float32(1.0))],
    ids=str,
)
def test_ancestors_of_extreme_intervals_come_to_an_end(interval):
    """Far out in a tail, or as thin as float32 allows, the chain is long but finite."""
    nodes = ancestors(interval, PAPER)
    assert 20 < len(nodes) <= 52
    assert all(node.covers(interval) for node in nodes.values())


def test_sigma_at_is_the_inverse_cdf_of_the_interval():
    """A fraction u of the interval's probability lies below sigma_at(u), in float32 precision."""
    u_B = torch.linspace(0.001, 0.999, 57, dtype=torch.float64)
    intervals = {"whole": WHOLE, "node": tree_node(5, 19, PAPER), **paper_intervals(PAPER)}
    for interval in intervals.values():
        sigma_B = PAPER.sigma_at(u_B, interval)
        below_B = [
            NoiseInterval(interval.sigma_min, sigma).mass(PAPER) for sigma in sigma_B.tolist()
        ]
        assert sigma_B.dtype == torch.float32
        assert torch.tensor(below_B).numpy() == pytest.approx(
            (u_B * interval.mass(PAPER)).numpy(), rel=1e-3, abs=1e-7
        )


def test_sigma_at_over_the_whole_axis_equals_the_quantiles():
    """Without an interval the inverse CDF is the ordinary quantile function."""
    u = [0.0001, 0.02, 0.5, 0.75, 0.9999]
    expected = [math.exp(-1.2 + 1.2 * NormalDist().inv_cdf(q)) for q in u]
    u_B = torch.tensor(u, dtype=torch.float64)
    assert PAPER.sigma_at(u_B, WHOLE).tolist() == pytest.approx(expected)


AWKWARD = [
    NoiseInterval(1.0, next_float32(1.0)),
    NoiseInterval(1.0, math.nextafter(1.0, 2.0)),
    NoiseInterval(0.3, next_float32(0.3, 2)),
    NoiseInterval(0.1, 0.10000001),
    NoiseInterval(79.99999, 80.0),
    NoiseInterval(80.0, math.inf),
    NoiseInterval(1e6, 1e6 + 1),
    NoiseInterval(1e15, math.inf),
    NoiseInterval(0.0, 1e-15),
    *(tree_node(9, index, PAPER) for index in (0, 255, 256, 511)),
    tree_node(40, 2**40 - 1, PAPER),
    tree_node(20, 2**19, PAPER),
    WHOLE,
]


@pytest.mark.parametrize("interval", AWKWARD, ids=str)
def test_sigma_at_never_leaves_the_interval_in_float32(interval):
    """No draw, extreme or ordinary, rounds out of the interval, to zero or to infinity."""
    extremes = [0.0, 5e-324, 2.0**-53, 2.0**-24, 0.5, 1 - 2.0**-24, 1 - 2.0**-53, 1.0]
    random_B = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma_B = PAPER.sigma_at(torch.cat([torch.tensor(extremes).double(), random_B]), interval)
    assert interval.contains(sigma_B).all()
    assert (sigma_B > 0).all()
    assert sigma_B.isfinite().all()


@pytest.mark.parametrize("interval", [NoiseInterval(1e30), NoiseInterval(0.0, 1e-30)], ids=str)
def test_sigma_at_refuses_an_interval_without_probability(interval):
    """An expert that could never be trained is an error, not a constant noise level."""
    with pytest.raises(ValueError, match="puts no probability on"):
        PAPER.sigma_at(torch.tensor([0.5]), interval)


@pytest.mark.parametrize("edge", [80.0, 1e4, 1e6])
def test_sigma_at_reaches_far_tails_without_losing_resolution(edge):
    """Far up, where 1 - p rounds to 1, half the draws still lie above the tail's own median."""
    median = PAPER.sigma_at(torch.tensor([0.5]), NoiseInterval(edge)).item()
    assert PAPER.survival(median) / PAPER.survival(edge) == pytest.approx(0.5, rel=1e-4)


def test_contains_is_half_open_and_compares_in_float64():
    """sigma_min is inside, sigma_max outside, even when float32 would round the edge onto them."""
    interval = NoiseInterval(0.5, 2.0)
    assert interval.contains(torch.tensor([0.4999, 0.5, 1.9999, 2.0])).tolist() == [
        False,
        True,
        True,
        False,
    ]
    edge = 0.1 + 1e-12  # float32 rounds it to the same value as 0.1
    below, above = NoiseInterval(0.0, edge), NoiseInterval(edge, math.inf)
    sigma_B = torch.tensor([0.1], dtype=torch.float32)  # 0.1000000015, above the edge
    assert (below.contains(sigma_B).item(), above.contains(sigma_B).item()) == (False, True)


@pytest.mark.parametrize("edges", [(1.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (math.nan, 1.0)])
def test_interval_refuses_edges_out_of_order(edges):
    """An interval must be a non-empty part of [0, inf)."""
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        NoiseInterval(*edges)


def test_interval_refuses_to_be_thinner_than_float32():
    """An interval between two neighbouring float32 values could never be sampled."""
    with pytest.raises(ValueError, match="no float32 noise level"):
        NoiseInterval(1.0 + 1e-10, 1.0 + 2e-10)


def test_interval_refuses_quantiles_out_of_order():
    """Quantiles are checked before they become noise levels."""
    with pytest.raises(ValueError, match="low < high"):
        NoiseInterval.from_quantiles(0.7, 0.2, PAPER)


@pytest.mark.parametrize("interval", [WHOLE, *paper_intervals(PAPER).values()], ids=str)
def test_interval_survives_json_digit_for_digit(interval):
    """JSON has no infinity, so it is written as a string and read back as infinity."""
    record = interval.to_json()
    assert NoiseInterval.from_json(record) == interval
    assert (record["sigma_max"] == "inf") == math.isinf(interval.sigma_max)


def test_tiling_accepts_any_order_of_experts():
    """Experts need not be listed from low to high noise."""
    for order in itertools.permutations(paper_intervals(PAPER).items()):
        check_tiling(dict(order))


def tiling_error(**intervals: NoiseInterval) -> str:
    """Message of the error that `check_tiling` must raise."""
    with pytest.raises(ValueError) as raised:
        check_tiling(intervals)
    return str(raised.value)


def test_a_gap_names_both_experts_and_its_exact_range():
    """The message holds every digit of the gap's edges and says which field to change."""
    edge = PAPER.quantile(1 / 3)
    message = tiling_error(a=NoiseInterval(0.0, edge), b=NoiseInterval(1.0))
    assert f"gap [{edge!r}, 1.0) between 'a'" in message
    assert re.search(r"make sigma_max of 'a' equal to sigma_min of 'b'", message)


def test_an_overlap_names_both_experts_and_its_exact_range():
    """The overlap's range is given, also when one expert lies within another."""
    message = tiling_error(a=NoiseInterval(0.0, 2.0), b=NoiseInterval(0.5))
    assert "overlap [0.5, 2.0) of 'a'" in message
    assert "and 'b'" in message
    inner = tiling_error(outer=WHOLE, inner=NoiseInterval(1.0, 2.0))
    assert "overlap [1.0, 2.0) of 'outer'" in inner


def test_uncovered_ends_of_the_axis_are_reported_together():
    """All problems come in one message: first those at low noise, last those at high noise."""
    message = tiling_error(a=NoiseInterval(0.1, 1.0), b=NoiseInterval(1.0, 80.0))
    assert message.index("no expert covers [0.0, 0.1)") < message.index(
        "no expert covers [80.0, inf)"
    )
    assert "at least one expert" in tiling_error()


def test_a_wide_expert_hides_no_later_gap():
    """An expert inside another does not shorten the reach from which a gap is measured."""
    message = tiling_error(
        a=NoiseInterval(0.0, 3.0), b=NoiseInterval(1.0, 2.0), c=NoiseInterval(4.0)
    )
    assert "overlap [1.0, 2.0) of 'a'" in message
    assert "gap [3.0, 4.0) between 'a'" in message


def test_distribution_survives_json():
    """The distribution is read back equal."""
    distribution = SigmaDistribution(log_mean=-0.3, log_std=1.3)
    assert SigmaDistribution.from_json(distribution.to_json()) == distribution
