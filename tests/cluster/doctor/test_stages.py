"""Tests of cluster.doctor.stages: units that fit the nodes of a profile, and units that do not."""

from typing import Any

import pytest

from cluster.doctor.stages import UnitNeeds, check_stages
from cluster.profile import Profile

GROUPS = {
    "cpu": {"cpus_per_node": 8, "memory_per_node_gib": 16, "num_nodes": 2},
    "gpu": {"cpus_per_node": 16, "memory_per_node_gib": 64, "accelerators_per_node": 4},
}
PLACE = Profile.from_mapping(
    "far",
    {
        "kind": "ray",
        "ray": {"address": "http://127.0.0.1:1"},
        "node_groups": GROUPS,
        "stages": {"base": "gpu"},
    },
)


@pytest.mark.parametrize(
    ("stage", "needs", "ok"),
    [
        ("base", {"num_workers": 4, "gpus": 1, "cpus": 4}, True),
        ("base", {"num_workers": 5, "gpus": 1}, False),
        ("base", {"gpus": 0.5, "num_workers": 8}, True),
        ("base", {"cpus": 17}, False),
        ("base", {"node_group": "cpu", "gpus": 1}, False),  # the recipe's word wins
        ("base", {"node_group": "cpu", "num_workers": 2, "cpus": 8}, True),
        ("base", {"node_group": "tpu"}, False),
        ("embed", {"gpus": 1}, True),  # of no group: it may be done on any
        ("embed", {"memory_gib": 65}, False),
        ("embed", {"cpus": 0}, True),
        ("experts", {"num_workers": 3, "placement": "strict_spread"}, True),
        ("experts", {"num_workers": 4, "placement": "strict_spread"}, False),
        ("experts", {"num_workers": 3, "cpus": 6, "placement": "strict_pack"}, False),
        ("experts", {"num_workers": 3, "cpus": 6}, True),
    ],
)
def test_units_are_compared_with_nodes(stage: str, needs: dict[str, Any], ok: bool) -> None:
    """Workers, devices, memory and placement, of the stage's group or of all."""
    (finding,) = check_stages(PLACE, {stage: UnitNeeds(**needs)})
    assert finding.ok is ok, finding.found
    assert stage in finding.found


def test_what_does_not_fit_is_told_in_figures() -> None:
    """Every stage that is too large, with what it takes and where."""
    wrong = {"base": UnitNeeds(gpus=8, cpus=64), "sample": UnitNeeds(node_group="tpu")}
    (finding,) = check_stages(PLACE, wrong)
    assert finding.found == (
        "a unit of base takes 1 workers of 64 CPUs, 8 GPUs, for which group gpu has no room; "
        "sample asks for group 'tpu', of cpu, gpu"
    )


def test_a_place_that_promises_nothing_is_not_judged() -> None:
    """A profile without groups leaves it to the run."""
    assert check_stages(Profile(name="here", kind="local"), {"base": UnitNeeds(gpus=8)}) == []
