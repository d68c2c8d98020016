"""`ediffi network`: the parameters of every network of a recipe, part by part."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence

from pipelines.errors import UserError
from pipelines.planning import plan
from pipelines.prediction.network_size import NetworkSize, network_sizes
from pipelines.prediction.stream_widths import StreamWidths, stream_widths
from pipelines.recipe_file import load_recipe
from pipelines.stage import Json
from pipelines.store.ledger import Ledger

_ORIGINS = {
    "cache": "as its cache says",
    "recipe": "as clip_fit will make it",
    "weights": "as its weights say",
    "name": "known of this model",
    "unknown": "not known here, so its projections are not counted: embed first",
}
_INDENT = 22


def network(options: Namespace) -> None:
    """Print how many parameters each network has, by part, beside the paper's.

    Raises:
        UserError: the recipe cannot be planned, or a network cannot be made of its settings.
    """
    recipe = load_recipe(options.recipe, options.overrides)
    planned = plan(recipe, Ledger.checked(options.store))
    manifests = {one.name: one.record.manifest() for one in planned if one.is_hit}
    try:
        widths = stream_widths(recipe, manifests)
        sizes = network_sizes(recipe, widths)
    except ValueError as error:
        raise UserError(str(error)) from error
    if options.json:
        print(json.dumps(_document(recipe.name, widths, sizes)))
        return
    print("\n".join(_lines(widths, sizes)))


def _document(
    recipe_name: str, widths: Mapping[str, StreamWidths], sizes: Sequence[NetworkSize]
) -> Json:
    return {
        "recipe": recipe_name,
        "streams": {
            name: {
                "token_width": one.token_width,
                "pooled_width": one.pooled_width,
                "source": one.source,
            }
            for name, one in widths.items()
        },
        "networks": [
            {
                "name": one.name,
                "image_px": one.image_px,
                "num_experts": one.num_experts,
                "num_parameters": one.num_parameters,
                "num_ensemble_parameters": one.num_ensemble_parameters,
                "parts": dict(one.parts),
                "blocks": dict(one.blocks),
                "streams": dict(one.streams),
                "paper": one.paper,
            }
            for one in sizes
        ],
        "num_parameters": sum(one.num_ensemble_parameters for one in sizes),
    }


def _lines(widths: Mapping[str, StreamWidths], sizes: Sequence[NetworkSize]) -> Iterator[str]:
    for name, one in widths.items():
        words = [f"tokens {one.token_width} wide"] if one.token_width else []
        words += [f"pooled {one.pooled_width} wide"] if one.pooled_width else []
        yield f"stream {name:<{_INDENT - 7}}{', '.join([*words, _ORIGINS[one.source]])}"
    for size in sizes:
        yield ""
        yield from _network_lines(size)
    total = sum(one.num_ensemble_parameters for one in sizes)
    of_paper = [one.num_experts * one.paper for one in sizes]
    yield ""
    yield f"{'all that draw':<{_INDENT}}{total:>15,}{_paper(sum(of_paper) if all(of_paper) else 0)}"


def _network_lines(size: NetworkSize) -> Iterator[str]:
    title = f"{size.name}, {size.image_px} px"
    yield f"{title:<{_INDENT}}{size.num_parameters:>15,}{_paper(size.paper)}"
    for part, num_parameters in size.parts.items():
        yield f"  {part:<{_INDENT - 2}}{num_parameters:>15,}"
        for stream, num_of_stream in size.streams.items() if part == "streams" else ():
            yield f"    {stream:<{_INDENT - 4}}{num_of_stream:>15,}"
    yield "  down, middle and up, by what their layers do"
    for kind, num_parameters in size.blocks.items():
        yield f"    {kind:<{_INDENT - 4}}{num_parameters:>15,}"
    if size.num_experts > 1:
        title = f"  {size.num_experts} experts"
        yield f"{title:<{_INDENT}}{size.num_ensemble_parameters:>15,}"


def _paper(num_parameters: float) -> str:
    return f"   the paper's: about {num_parameters / 1e9:.1f} B" if num_parameters else ""
