"""Token states of transformers models; of T5 and its kin, the encoder half.

Shape legend: B batch, T tokens, D width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ediffi.encoders import TextEncoder, TokenizedCaptions, sub_lists
from ediffi.encoding.encoder_weights import (
    EncoderConfig,
    explained_loading,
    hub_revision,
    local_weights,
)

# Letters of scripts that put spaces between words: not Thai, kana, Chinese characters.
_LETTER = r"[^\W\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]"


class TransformersEncoder(TextEncoder):
    """States after the last block, or after the last but one, normalised as the network ends."""

    def __init__(self, config: EncoderConfig, device: str) -> None:
        """Load tokenizer and network; ValueError when either cannot be had."""
        super().__init__(config, device)
        import transformers

        path = local_weights(config)
        name, revision = hub_revision(config) if path is None else (str(path), "")
        pinned = {"revision": revision} if revision else {}
        with explained_loading(config):
            architecture = transformers.AutoConfig.from_pretrained(name, **pinned)
            if path is None:
                # Whatever moves on the hub meanwhile, all files are of the commit found first.
                self.revision = getattr(architecture, "_commit_hash", None) or revision
                pinned = {"revision": self.revision} if self.revision else {}
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, **pinned)
            self.network = _load_network(name, architecture, config, pinned)
        self.network.to(device).eval().requires_grad_(False)
        self.pad_id = self.tokenizer.pad_token_id or 0
        # Relative positions (T5) set no limit of their own.
        self._measure(getattr(architecture, "max_position_embeddings", config.max_tokens))

    def tokenize(self, captions: Sequence[str]) -> TokenizedCaptions:
        if not captions:
            return TokenizedCaptions([], [])
        ids = self._ids(list(captions))
        num_tokens = [len(row) for row in ids]
        long_indices = [i for i, num in enumerate(num_tokens) if num > self.config.max_tokens]
        if long_indices:
            texts = [captions[i] for i in long_indices]
            cut = self._ids(texts, truncation=True, max_length=self.config.max_tokens)
            for i, row in zip(long_indices, cut):
                ids[i] = row
        return TokenizedCaptions(ids, num_tokens)

    def _whole_ids(self, caption: str) -> list[int]:
        return self._ids([caption])[0]

    def _occurrences(self, caption: str, phrase: str) -> list[tuple[int, ...]]:
        wanted = self._ids([phrase], add_special_tokens=False)[0]
        if not self.tokenizer.is_fast:  # it does not tell which letters a token came from
            return sub_lists(self._whole_ids(caption), wanted)
        # Not by ids alone: after a quotation mark the same word has other tokens.
        words = r"\s+".join(re.escape(word) for word in phrase.split())
        matches = re.finditer(f"(?<!{_LETTER}){words}(?!{_LETTER})", caption, re.IGNORECASE)
        spans = self.tokenizer(caption, return_offsets_mapping=True, verbose=False)
        found = []
        for match in matches:
            if self._ids([match.group()], add_special_tokens=False)[0] == wanted:
                found.append(_overlapping(spans["offset_mapping"], *match.span()))
        return [indices for indices in found if indices]

    def _ids(self, captions: list[str], **options: Any) -> list[list[int]]:
        encoding = self.tokenizer(
            captions,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **options,
        )
        return encoding["input_ids"]

    def _forward(self, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, None]:
        return self.network(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state, None


def _overlapping(spans: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, ...]:
    """Indices of the spans that share a letter with start:end; special tokens have empty spans."""
    return tuple(i for i, (first, last) in enumerate(spans) if first < end and start < last)


def _load_network(
    name: str, architecture: Any, config: EncoderConfig, pinned: dict[str, str]
) -> Any:
    import transformers

    network_class = {
        "t5": transformers.T5EncoderModel,
        "mt5": transformers.MT5EncoderModel,
        "umt5": transformers.UMT5EncoderModel,
    }.get(architecture.model_type, transformers.AutoModel)
    if config.layer == "penultimate":
        # The last block is not even built: its states would be thrown away.
        if architecture.num_hidden_layers < 2:
            raise ValueError("layer must be 'last' for a network of one block, got 'penultimate'")
        architecture.num_hidden_layers -= 1
    dtype = torch.bfloat16 if config.compute_dtype == "bf16" else torch.float32
    return network_class.from_pretrained(name, config=architecture, dtype=dtype, **pinned)
