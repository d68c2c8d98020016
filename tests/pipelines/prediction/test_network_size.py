"""Tests of pipelines.prediction.network_size: counts are those of the networks themselves."""

from __future__ import annotations

import pytest

from ediffi.network import build_network
from pipelines.prediction.network_size import NetworkSize, network_sizes
from pipelines.prediction.stream_widths import StreamWidths, stream_widths
from pipelines.recipe import Recipe
from pipelines.recipe_file import load_recipe

WIDTHS = {
    "t5": StreamWidths(token_width=384, source="cache"),
    "clip_text": StreamWidths(token_width=64, pooled_width=64, source="cache"),
    "clip_image": StreamWidths(pooled_width=64, source="cache"),
}


def sizes_of(recipe: Recipe, widths: dict[str, StreamWidths] = WIDTHS) -> dict[str, NetworkSize]:
    """The recipe's networks by name."""
    return {one.name: one for one in network_sizes(recipe, widths)}


def test_counts_are_those_of_the_networks() -> None:
    """Built for real, both families have as many, and every part counts what it names."""
    from ediffi.conditioning import StreamConfig

    recipe = load_recipe("super-resolution-toy")
    streams = tuple(
        StreamConfig(
            name=name,
            token_width=one.token_width,
            pooled_width=one.pooled_width,
            pooled_as_token=name == "clip_image",
        )
        for name, one in WIDTHS.items()
    )
    sizes = sizes_of(recipe)
    for name, config in (
        ("base", recipe.network.config(16, streams)),
        ("sr32", recipe.super_resolution["sr32"].network_config(streams)),
    ):
        network, size = build_network(config), sizes[name]
        assert size.num_parameters == network.num_parameters
        assert size.parts["streams"] == sum(p.numel() for p in network.streams.parameters())
        assert sum(size.streams.values()) == size.parts["streams"]
        layers = [n for n, _ in network.named_modules() if n.endswith("cross_attention")]
        modules = dict(network.named_modules())
        expected = sum(p.numel() for layer in layers for p in modules[layer].parameters())
        assert size.blocks["cross-attention"] == expected
        inside = ("down", "middle", "up")
        assert sum(size.blocks.values()) == sum(size.parts.get(one, 0) for one in inside)


def test_experts_are_counted_by_their_intervals() -> None:
    """Three of the base, two halves of what enlarges, one where there are none."""
    sizes = sizes_of(load_recipe("super-resolution-toy"))
    assert [one.num_experts for one in sizes.values()] == [3, 2]
    assert sizes["sr32"].num_ensemble_parameters == 2 * sizes["sr32"].num_parameters
    alone = load_recipe("super-resolution-toy", ["super_resolution.sr32.experts=null"])
    assert sizes_of(alone)["sr32"].num_experts == 1


def test_a_stream_of_unknown_width_is_left_out() -> None:
    """All else is counted as with it."""
    recipe = load_recipe("demo")
    known = sizes_of(recipe)["base"]
    for name in WIDTHS:
        without = sizes_of(recipe, {**WIDTHS, name: StreamWidths()})["base"]
        assert name not in without.streams
        assert without.num_parameters == known.num_parameters - known.streams[name]


def test_the_papers_networks_stand_beside_ours() -> None:
    """By their sizes alone; the counts are those that docs/paper.md tells."""
    recipe = load_recipe("ediffi-1024px")
    sizes = network_sizes(recipe, stream_widths(recipe, {}))
    assert [one.name for one in sizes] == ["base", "sr256", "sr1024"]
    assert [one.paper for one in sizes] == [1.0e9, 0.3e9, 0.4e9]
    assert [round(one.num_parameters / 1e6) for one in sizes] == [715, 456, 208]
    assert [one.num_experts for one in sizes] == [3, 2, 1]
    smaller = load_recipe("ediffi-64px", ["network.num_blocks=2"])
    assert sizes_of(smaller, stream_widths(smaller, {}))["base"].paper == 0


def test_settings_that_make_no_network_are_refused() -> None:
    """With the library's own words."""
    recipe = load_recipe("demo", ["network.head_width=7"])
    with pytest.raises(ValueError, match="head_width must divide"):
        sizes_of(recipe)
