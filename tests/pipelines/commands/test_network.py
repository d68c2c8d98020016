"""Tests of `ediffi network`: what it prints, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Callable

from ediffi.conditioning import StreamConfig
from ediffi.network import build_network
from pipelines.recipe import Recipe


def test_every_network_is_told_part_by_part(ediffi: Callable[..., tuple]) -> None:
    """Its parts sum to its count, and the ensemble holds one for each expert."""
    code, out, _ = ediffi("network", "super-resolution-toy", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["streams"]["t5"] == {
        "token_width": 384,
        "pooled_width": 0,
        "source": "weights",
    }
    base, larger = document["networks"]
    assert (base["name"], base["image_px"], base["num_experts"]) == ("base", 16, 3)
    assert (larger["name"], larger["image_px"], larger["num_experts"]) == ("sr32", 32, 2)
    for one in (base, larger):
        assert sum(one["parts"].values()) == one["num_parameters"]
        assert one["num_ensemble_parameters"] == one["num_experts"] * one["num_parameters"]
    total = sum(one["num_ensemble_parameters"] for one in (base, larger))
    assert document["num_parameters"] == total


def test_people_read_the_same_numbers(ediffi: Callable[..., tuple], demo_recipe: Recipe) -> None:
    """With an override, and without a word on the paper where its networks are others."""
    code, out, _ = ediffi("network", "demo", "--set", "network.widths=[32, 64]")
    streams = (
        StreamConfig(name="t5", token_width=384),
        StreamConfig(name="clip_text", token_width=64, pooled_width=64),
        StreamConfig(name="clip_image", pooled_width=64, pooled_as_token=True),
    )
    network = demo_recipe.network.model_copy(update={"widths": (32, 64)})
    count = build_network(network.config(16, streams)).num_parameters
    assert code == 0
    assert f"{'base, 16 px':<22}{count:>15,}\n" in out
    assert f"{'  3 experts':<22}{3 * count:>15,}\n" in out
    assert "the paper" not in out


def test_the_papers_counts_stand_beside(ediffi: Callable[..., tuple]) -> None:
    """For each network and for all that draw: 3 times 1.0, 2 times 0.3, and 0.4 billions."""
    _, out, _ = ediffi("network", "ediffi-1024px")
    told = [line.rpartition("about ")[2] for line in out.splitlines() if "the paper's" in line]
    assert told == ["1.0 B", "0.3 B", "0.4 B", "4.0 B"]


def test_what_is_not_known_is_said(ediffi: Callable[..., tuple]) -> None:
    """A name on the hub that nobody has downloaded."""
    code, out, _ = ediffi("network", "demo", "--set", "encoders.t5.weights=someone/model")
    assert code == 0
    assert "not known here, so its projections are not counted: embed first" in out


def test_settings_that_make_no_network_are_explained(ediffi: Callable[..., tuple]) -> None:
    """On stderr, as every wrong recipe."""
    code, out, err = ediffi("network", "demo", "--set", "network.head_width=7")
    assert (code, out) == (2, "")
    assert "head_width must divide every width with attention" in err
