"""How wide the embeddings of an encoder are: as its cache says, or from what is known without it.

No encoder is loaded, and nothing is fetched from a hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.recipe import ClipFit, Encoder, Recipe
from pipelines.stage import Manifest
from pipelines.stages.inputs import EMBED_PREFIX, NULL_UNIT
from pipelines.store.location import location

if TYPE_CHECKING:
    from ediffi.encoding.encoder_weights import EncoderConfig

# T5 encoders on the hub by the end of their names. `xl` and `xxl` are those of v1.1 and its
# descendants; the first T5 has 3b and 11b, of which more is width of layers than of states.
_T5_WIDTHS = {
    "small": 512,
    "base": 768,
    "large": 1024,
    "3b": 1024,
    "11b": 1024,
    "xl": 2048,
    "xxl": 4096,
}
_T5_NAME = re.compile(r"(?:^|[-/])(?:m|flan-)?t5(?:-v1_1|-lm-adapt)?-(\w+)$")

Source = Literal["cache", "recipe", "weights", "name", "unknown"]


@dataclass(frozen=True, kw_only=True)
class StreamWidths:
    """Widths of tokens and pooled vector; 0: the stream has none."""

    token_width: int = 0
    pooled_width: int = 0
    source: Source = "unknown"

    @property
    def is_known(self) -> bool:
        return self.source != "unknown"


def stream_widths(recipe: Recipe, manifests: Mapping[str, Manifest]) -> dict[str, StreamWidths]:
    """Widths of every stream of a recipe.

    Args:
        manifests: of stages that are finished, by name; those of embedding are looked for.

    Raises:
        ValueError: weights that must be on this machine are not, or a cache made elsewhere has no
            finished stage.
    """
    found = {}
    for name, encoder in recipe.encoders.items():
        manifest = manifests.get(EMBED_PREFIX + name)
        if manifest is None and encoder.cache:
            manifest = Manifest.load(location(encoder.cache))
        if manifest is not None:
            facts = manifest.receipt(NULL_UNIT).facts
            found[name] = StreamWidths(
                token_width=facts["token_width"], pooled_width=facts["pooled_width"], source="cache"
            )
        else:
            found[name] = known_widths(encoder, recipe.clip_fit)
    return found


def known_widths(encoder: Encoder, clip_fit: ClipFit | None) -> StreamWidths:
    """Widths of an encoder without its cache.

    Raises:
        ValueError: weights that must be on this machine are not.
    """
    if encoder.is_fitted:
        assert clip_fit is not None  # the recipe saw to it
        return _clip_widths(encoder, _fitted_architecture(clip_fit), "recipe")
    if encoder.family == "transformers":
        return _transformers_widths(encoder)
    return _open_clip_widths(encoder)


def _fitted_architecture(clip_fit: ClipFit) -> Mapping[str, Any]:
    from ediffi.clip_fit import ClipFitConfig

    return ClipFitConfig(**clip_fit.model_dump()).model_json()


def _open_clip_widths(encoder: Encoder) -> StreamWidths:
    from ediffi.encoding.encoder_weights import HUB_PREFIX, local_weights

    path = local_weights(_config(encoder))
    if path is not None and path.is_dir():
        architecture = json.loads((path / "open_clip_config.json").read_text())["model_cfg"]
        return _clip_widths(encoder, architecture, "weights")
    if encoder.weights.startswith(HUB_PREFIX):
        cached = _in_hub_cache(_config(encoder), "open_clip_config.json")
        return _clip_widths(encoder, cached["model_cfg"], "weights") if cached else StreamWidths()
    import open_clip

    architecture = open_clip.get_model_config(encoder.model)
    return _clip_widths(encoder, architecture, "name") if architecture else StreamWidths()


def _clip_widths(encoder: Encoder, architecture: Mapping[str, Any], source: Source) -> StreamWidths:
    pooled_width = architecture["embed_dim"]
    if encoder.is_image:
        return StreamWidths(pooled_width=pooled_width, source=source)
    text = architecture["text_cfg"]
    if "hf_model_name" in text or "width" not in text:
        return StreamWidths()  # a tower of another library
    return StreamWidths(token_width=text["width"], pooled_width=pooled_width, source=source)


def _transformers_widths(encoder: Encoder) -> StreamWidths:
    from ediffi.encoding.encoder_weights import hub_revision, local_weights

    config = _config(encoder)
    path = local_weights(config)
    if path is not None:
        architecture = json.loads((path / "config.json").read_text())
    else:
        architecture = _in_hub_cache(config, "config.json")
    for field in ("d_model", "hidden_size"):
        if field in architecture:
            return StreamWidths(token_width=architecture[field], source="weights")
    match = None if path is not None else _T5_NAME.search(hub_revision(config)[0])
    if match is None or match[1] not in _T5_WIDTHS:
        return StreamWidths()
    return StreamWidths(token_width=_T5_WIDTHS[match[1]], source="name")


def _in_hub_cache(config: EncoderConfig, filename: str) -> Mapping[str, Any]:
    """A JSON file of a hub repository as downloaded before; empty if it never was."""
    from transformers.utils import cached_file

    from ediffi.encoding.encoder_weights import hub_revision

    repository, revision = hub_revision(config)
    try:
        path = cached_file(repository, filename, revision=revision or None, local_files_only=True)
    except OSError:  # how the library says that it is not there
        return {}
    assert path is not None  # else it raised
    content: dict[str, Any] = json.loads(Path(path).read_text())
    return content


def _config(encoder: Encoder) -> EncoderConfig:
    from pipelines.stages.inputs import encoder_config

    return encoder_config(encoder, {})
