"""How many parameters the networks of a recipe have, part by part; nothing of them is allocated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.prediction.stream_widths import StreamWidths
from pipelines.recipe import Recipe
from pipelines.recipe_sections.super_resolution import by_size

if TYPE_CHECKING:
    from torch import nn

    from ediffi.conditioning import StreamConfig
    from ediffi.network import NetworkConfig

BASE = "base"
_NULL_TOKEN = "null token"
# First part of a parameter's name -> the part of the network that it is counted to.
_PARTS = {
    "noise_embedding": "noise embedding",
    "streams": "streams",
    "conv_in": "down",
    "encoder": "down",
    "down": "down",
    "middle_in": "middle",
    "middle_out": "middle",
    "decoder": "up",
    "up": "up",
    "block_out": "up",
    "norm_out": "output",
    "conv_out": "output",
}
# The paper gives counts of whole systems, with and without experts and with their text encoders.
# Their differences are about these: for an expert of the base, for one of SR256, and what is left
# for SR1024. Each belongs to a network of these sizes: pixels, widths, blocks.
_PAPER: dict[tuple[int, tuple[int, ...], int | tuple[int, ...]], float] = {
    (64, (256, 512, 1024, 1024), 3): 1.0e9,
    (256, (128, 256, 512, 1024), (2, 4, 8, 8)): 0.3e9,
    (1024, (128, 256, 512, 512), (2, 4, 8, 8)): 0.4e9,
}


@dataclass(frozen=True, kw_only=True)
class NetworkSize:
    """Parameters of one network of a recipe; its experts are all alike.

    Attributes:
        image_px: side of the pictures that it draws.
        parts: the whole network, by part.
        blocks: its down, middle and up parts once more, by what their layers do.
        streams: `parts["streams"]` once more: the projections of each, and the null token.
        num_experts: so many networks draw; more than one also have the parent beside them.
        paper: what the paper's network of these sizes has, about; 0: it has none like this.
    """

    name: str
    image_px: int
    parts: Mapping[str, int]
    blocks: Mapping[str, int]
    streams: Mapping[str, int]
    num_experts: int
    paper: float

    @property
    def num_parameters(self) -> int:
        """Of one network."""
        return sum(self.parts.values())

    @property
    def num_ensemble_parameters(self) -> int:
        """Of all that draw."""
        return self.num_experts * self.num_parameters


def network_sizes(recipe: Recipe, widths: Mapping[str, StreamWidths]) -> list[NetworkSize]:
    """Count the networks of a recipe: the base's first, then those that enlarge, by size.

    Args:
        widths: of every encoder's stream; those that are not known are left out of the counts.

    Raises:
        ValueError: a network cannot be made of the recipe's settings.
    """
    streams = tuple(_stream(recipe, name, one) for name, one in widths.items())
    left_out = frozenset(name for name, one in widths.items() if not one.is_known)
    distribution = recipe.noise.distribution
    network = recipe.network
    sizes = [
        _count(
            BASE,
            network.config(recipe.base_px, streams),
            left_out,
            image_px=recipe.base_px,
            num_experts=len(recipe.experts.intervals(distribution)),
            paper=_PAPER.get((recipe.base_px, network.widths, network.num_blocks), 0.0),
        )
    ]
    for name, model in by_size(recipe.super_resolution).items():
        experts = model.experts
        key = (model.image_px, model.network.widths, model.network.num_blocks)
        sizes.append(
            _count(
                name,
                model.network_config(streams),
                left_out,
                image_px=model.image_px,
                num_experts=1 if experts is None else len(experts.intervals(distribution)),
                paper=_PAPER.get(key, 0.0),
            )
        )
    return sizes


def _stream(recipe: Recipe, name: str, widths: StreamWidths) -> StreamConfig:
    from ediffi.conditioning import StreamConfig

    is_image = recipe.encoders[name].is_image
    if not widths.is_known:  # any width: its projections are not counted
        tokens, pooled = (0, 1) if is_image else (1, 0)
    else:
        tokens, pooled = widths.token_width, widths.pooled_width
    return StreamConfig(
        name=name, token_width=tokens, pooled_width=pooled, pooled_as_token=is_image
    )


def _count(
    name: str,
    config: NetworkConfig,
    left_out: frozenset[str],
    *,
    image_px: int,
    num_experts: int,
    paper: float,
) -> NetworkSize:
    import torch

    from ediffi.network import build_network

    with torch.device("meta"):
        network = build_network(config)
    parts, blocks, streams = Counter[str](), Counter[str](), Counter[str]()
    for place, num_parameters in _parameters(network):
        first, *inner = place
        if first == "streams":
            stream = inner[1] if inner[0] == "projections" else _NULL_TOKEN
            if stream in left_out:
                continue
            streams[stream] += num_parameters
        parts[_PARTS[first]] += num_parameters
        if _PARTS[first] in ("down", "middle", "up"):
            attention = next((p for p in inner if p in ("self_attention", "cross_attention")), "")
            blocks[attention.replace("_", "-") or "convolutions"] += num_parameters
    return NetworkSize(
        name=name,
        image_px=image_px,
        parts=parts,
        blocks=blocks,
        streams=streams,
        num_experts=num_experts,
        paper=paper,
    )


def _parameters(network: nn.Module) -> Iterator[tuple[list[str], int]]:
    for name, parameter in network.named_parameters():
        yield name.split("."), parameter.numel()
