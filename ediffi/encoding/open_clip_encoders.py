"""CLIP through open_clip: token states and embeddings of captions, embeddings of pictures.

Shape legend: B batch, T tokens, D width, C H W.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ediffi.encoders import ImageEncoder, TextEncoder, TokenizedCaptions, sub_lists
from ediffi.encoding.clip_text import clip_text_states
from ediffi.encoding.encoder_identity import encoder_identity
from ediffi.encoding.encoder_weights import (
    HUB_PREFIX,
    EncoderConfig,
    explained_loading,
    hub_revision,
    local_weights,
)

if TYPE_CHECKING:
    from PIL.Image import Image

_CONFIG_FILE = "open_clip_config.json"


class OpenClipTextEncoder(TextEncoder):
    """Token states of CLIP's text tower up to the end token, and its normalised embedding."""

    def __init__(self, config: EncoderConfig, device: str) -> None:
        """Load the model; ValueError when it cannot be had or its text tower is not causal."""
        super().__init__(config, device)
        import open_clip

        self.network, _, name, self.revision = _open_clip_model(config, device)
        self.tokenizer = open_clip.get_tokenizer(name)
        causal = isinstance(self.network, open_clip.CLIP) and self.network.attn_mask is not None
        if not (causal and isinstance(self.tokenizer, open_clip.SimpleTokenizer)):
            raise ValueError(
                "weights and model must name a CLIP with OpenAI's tokenizer and a causal text "
                f"tower, got {config.weights!r} {config.model!r}: choose one such as ViT-L-14"
            )
        if config.layer == "penultimate" and len(self.network.transformer.resblocks) < 2:
            raise ValueError("layer must be 'last' for a network of one block, got 'penultimate'")
        self._measure(self.network.context_length)

    def tokenize(self, captions: Sequence[str]) -> TokenizedCaptions:
        whole = [self._whole_ids(caption) for caption in captions]
        longest = self.config.max_tokens - 1  # and the end token
        return TokenizedCaptions(
            ids=[[*row[:-1][:longest], row[-1]] for row in whole],
            num_tokens=[len(row) for row in whole],
        )

    def _whole_ids(self, caption: str) -> list[int]:
        start, end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        return [start, *self.tokenizer.encode(caption), end]

    def _occurrences(self, caption: str, phrase: str) -> list[tuple[int, ...]]:
        # Words are tokenized one by one, and the last token of a word is marked as such: "red"
        # is not found in "redder".
        return sub_lists(self._whole_ids(caption), self.tokenizer.encode(phrase))

    def _forward(self, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        return clip_text_states(self.network, ids_BT, self.config.layer)


class OpenClipImageEncoder(ImageEncoder):
    """CLIP's normalised image embedding."""

    def __init__(self, config: EncoderConfig, device: str) -> None:
        """Load the model; ValueError when it cannot be had."""
        super().__init__(config, device)
        from PIL import Image

        self.network, self._preprocess, _, self.revision = _open_clip_model(config, device)
        blank = self.encode([Image.new("RGB", (8, 8))])[0]
        self.pooled_width = blank["pooled"].shape[-1]

    def prepare(self, picture: Image) -> Tensor:
        return self._preprocess(picture.convert("RGB"))

    def _forward(self, x_BCHW: Tensor) -> Tensor:
        return self.network.encode_image(x_BCHW, normalize=True)


def _open_clip_model(config: EncoderConfig, device: str) -> tuple[Any, Any, str, str]:
    """Network, picture transform, open_clip's name of the model, and the hub's commit."""
    name, revision = _open_clip_name(config)
    pretrained = config.weights if name == config.model else None
    weights = str(encoder_identity(config)["weights"])
    with explained_loading(config):
        network, preprocess = _cached_open_clip_model(
            name, pretrained, config.compute_dtype, device, weights
        )
    return network, preprocess, name, revision


def _open_clip_name(config: EncoderConfig) -> tuple[str, str]:
    """What open_clip calls the model (a directory or an architecture), and the hub's commit."""
    path = local_weights(config)
    if path is not None and path.is_dir():
        return f"local-dir:{path}", ""
    if config.weights.startswith(HUB_PREFIX):
        return _from_hub(config)
    if not config.model:
        raise ValueError(
            f"model must name an open_clip architecture for weights {config.weights!r}, "
            "got nothing: for example ViT-L-14 for the tag openai"
        )
    return config.model, ""


def _from_hub(config: EncoderConfig) -> tuple[str, str]:
    """Fetch configuration and weights of one commit, which open_clip's own names cannot pin."""
    from open_clip.pretrained import download_pretrained_from_hf

    repository, revision = hub_revision(config)
    with explained_loading(config):
        found = download_pretrained_from_hf(
            repository, filename=_CONFIG_FILE, revision=revision or None
        )
        folder = Path(found).parent  # named after the commit
        download_pretrained_from_hf(repository, revision=folder.name)
    return f"local-dir:{folder}", folder.name


@functools.lru_cache(maxsize=8)
def _cached_open_clip_model(
    name: str, pretrained: str | None, precision: str, device: str, weights: str
) -> tuple[Any, Any]:
    """Network and picture transform, shared by the text and the image encoder.

    `weights` is their identity: what lies under the name may change.
    """
    import open_clip

    tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    network, preprocess = open_clip.create_model_from_pretrained(
        name,
        pretrained,
        precision=precision,
        device=device,
        # open_clip only warns when ViT-L-14 meets OpenAI's weights; the features are then wrong.
        force_quick_gelu=bool(tag.get("quick_gelu", False)),
    )
    return network.eval().requires_grad_(False), preprocess
