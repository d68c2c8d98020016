"""Frozen encoders: T5 and its kin through transformers, CLIP text and image through open_clip.

eDiff-I section 5 conditions on T5-XXL token states, on CLIP ViT-L/14 text token states with their
pooled vector, and on the pooled CLIP image embedding, all computed once and off line. Small local
weights run through the same classes. This module is the front door: the networks themselves lie
in `transformers_encoder` and `open_clip_encoders`, the making of caches in `embedding`.

Shape legend: B batch, T tokens, D width, C H W.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ediffi.encoding.clip_text import clip_text_states
from ediffi.encoding.encoded_batch import EncodedBatch, encoded_batch
from ediffi.encoding.encoder_identity import encoder_identity, identity_digest
from ediffi.encoding.encoder_weights import EncoderConfig, weights_identity
from ediffi.encoding.quantization import dequantize

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Encoder",
    "EncoderConfig",
    "ImageEncoder",
    "TextEncoder",
    "TokenizedCaptions",
    "clip_text_states",
    "load_encoder",
    "token_batches",
    "weights_identity",
]

# Per pass, by kind of device. A GPU is filled only by many tokens (8192 take 0.5 GB of T5-XXL's
# feed-forward activations in bf16); a CPU is a fifth faster while activations stay in its cache.
BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
BATCH_IMAGES = {"cpu": 16, "cuda": 128}
_MAX_PADDING_FRACTION = 0.05  # of a batch, once it has a quarter of its tokens


class Encoder(ABC):
    """A frozen network that turns captions or pictures into the tensors of one stream."""

    kind: Literal["text", "image"]
    token_width: int  # D of "tokens"; 0: the stream has none
    pooled_width: int  # D of "pooled"; 0: the stream has none
    revision: str = ""  # the commit that a hub name led to; "" for weights on this machine

    def __init__(self, config: EncoderConfig, device: str) -> None:
        """Keep what every encoder needs; subclasses load their network."""
        self.config = config
        self.device = device
        kind = "cpu" if device.startswith("cpu") else "cuda"
        self.batch_tokens = BATCH_TOKENS[kind]
        self.batch_images = BATCH_IMAGES[kind]

    @abstractmethod
    def encode(self, batch: Sequence[Any]) -> list[dict[str, Tensor]]:
        """Encode captions (str) or RGB pictures (PIL), in order, as a reader of a cache gets them.

        Returns:
            Per sample {"tokens": (T, D)}, {"tokens": (T, D), "pooled": (D,)} or
            {"pooled": (D,)}, on the CPU in the storage dtype (int8: taken back to bf16). T is the
            caption's own number of tokens under `pad: drop` and `max_tokens` under `pad: keep`.
            Beyond rounding, no result depends on the rest of the batch.
        """

    @abstractmethod
    def null(self) -> dict[str, Tensor]:
        """Stand-in for a missing input: the encoding of "" for text, zeros for a picture."""

    def _samples(self, batch: EncodedBatch) -> list[dict[str, Tensor]]:
        copied = batch.to_cpu()
        copied.arrived()
        # Clones, so that one sample does not keep its whole batch alive.
        return [
            dequantize({name: tensor.clone() for name, tensor in sample.items()})
            for sample in copied.samples()
        ]


class TokenizedCaptions(NamedTuple):
    """Captions as token ids. `num_tokens` counts before truncation, special tokens included."""

    ids: list[list[int]]
    num_tokens: list[int]


class TextEncoder(Encoder):
    """Encodes captions of similar length together; subclasses tokenize and run the network."""

    kind = "text"
    pad_id = 0

    @abstractmethod
    def tokenize(self, captions: Sequence[str]) -> TokenizedCaptions:
        """Token ids cut to max_tokens, still ending as the network was taught."""

    @abstractmethod
    def _forward(self, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor | None]:
        """Token states (B, T, D) and, where the network has one, the pooled vector (B, D)."""

    @abstractmethod
    def _whole_ids(self, caption: str) -> list[int]:
        """Token ids of a caption as `tokenize` gives them, but not cut."""

    @abstractmethod
    def _occurrences(self, caption: str, phrase: str) -> list[tuple[int, ...]]:
        """Where a phrase is: indices into `_whole_ids(caption)`, a tuple for each occurrence."""

    def find_phrase(self, caption: str, phrase: str) -> tuple[int, ...]:
        """Which of a caption's token states speak of a phrase, wherever the phrase stands in it.

        Case and white space count as much as they do to the tokenizer.

        Returns:
            Indices among the tokens that a cache stores, ascending; those of all occurrences.

        Raises:
            ValueError: the phrase is blank, not in the caption, or `max_tokens` cuts it off.
        """
        if not phrase.strip():
            raise ValueError(f"a phrase to find must hold a word, got {phrase!r}")
        occurrences = self._occurrences(caption, phrase)
        if not occurrences:
            raise ValueError(
                f"the phrase must be a part of its caption, word for word: got {phrase!r}, which "
                f"{self.config.weights!r} does not find in {caption!r}"
            )
        stored, whole = self.tokenize([caption]).ids[0], self._whole_ids(caption)
        num_kept = len(stored)
        if len(whole) > len(stored):  # from where they differ on, tokens were cut off
            num_kept = next(i for i, (ours, all_) in enumerate(zip(stored, whole)) if ours != all_)
        kept = {index for found in occurrences if max(found) < num_kept for index in found}
        if not kept:
            raise ValueError(
                f"the phrase {phrase!r} must lie within the {self.config.max_tokens} tokens that "
                f"{self.config.weights!r} reads, and is cut off in {caption!r}: move it forward"
            )
        return tuple(sorted(kept))

    def encode(self, batch: Sequence[str]) -> list[dict[str, Tensor]]:
        if isinstance(batch, str):
            raise ValueError(f"encode takes a sequence of captions, got the one string {batch!r}")
        ids = self.tokenize(batch).ids
        encoded: dict[int, dict[str, Tensor]] = {}
        lengths = [self.stored_length(row) for row in ids]
        for indices in token_batches(lengths, self.batch_tokens):
            encoded.update(zip(indices, self._samples(self.encode_ids([ids[i] for i in indices]))))
        return [encoded[i] for i in range(len(ids))]

    def null(self) -> dict[str, Tensor]:
        return self.encode([""])[0]

    def stored_length(self, ids: Sequence[int]) -> int:
        """How many token states a caption leaves in a cache."""
        return self.config.max_tokens if self.config.pad == "keep" else len(ids)

    def encode_ids(self, ids: Sequence[Sequence[int]]) -> EncodedBatch:
        """One pass over token ids; what comes back still lies on the device."""
        lengths = [self.stored_length(row) for row in ids]
        pinned = self.device.startswith("cuda")
        size = (len(ids), max(lengths))
        ids_BT = torch.full(size, self.pad_id, pin_memory=pinned)
        mask_BT = torch.zeros(size, dtype=torch.long, pin_memory=pinned)
        for i, row in enumerate(ids):
            ids_BT[i, : len(row)] = torch.tensor(row)
            mask_BT[i, : len(row)] = 1
        with torch.inference_mode():
            states_BTD, pooled_BD = self._forward(
                ids_BT.to(self.device, non_blocking=True),
                mask_BT.to(self.device, non_blocking=True),
            )
            raw = {"tokens": states_BTD}
            if pooled_BD is not None:
                raw["pooled"] = pooled_BD
            return encoded_batch(raw, lengths, self.config.storage_dtype)

    def _measure(self, longest: int) -> None:
        """Check max_tokens against the network's limit and read the widths off one encoding."""
        if self.config.max_tokens > longest:
            raise ValueError(
                f"max_tokens must be at most {longest} for {self.config.weights!r}, "
                f"got {self.config.max_tokens}: the network has no positions beyond"
            )
        null = self.null()
        self.token_width = null["tokens"].shape[-1]
        self.pooled_width = null["pooled"].shape[-1] if "pooled" in null else 0


class ImageEncoder(Encoder):
    """Encodes pictures; subclasses prepare them and run the network."""

    kind = "image"
    token_width = 0

    @abstractmethod
    def prepare(self, picture: Image) -> Tensor:
        """Resize, crop and normalise one RGB picture: float32 (C, H, W). Safe in threads."""

    @abstractmethod
    def _forward(self, x_BCHW: Tensor) -> Tensor:
        """Embeddings (B, D)."""

    def encode(self, batch: Sequence[Image]) -> list[dict[str, Tensor]]:
        encoded = []
        for start in range(0, len(batch), self.batch_images):
            part = batch[start : start + self.batch_images]
            pictures = [self.prepare(picture) for picture in part]
            encoded += self._samples(self.encode_pixels(pictures))
        return encoded

    def null(self) -> dict[str, Tensor]:
        blank = encoded_batch(
            {"pooled": torch.zeros(1, self.pooled_width)}, [0], self.config.storage_dtype
        )
        return self._samples(blank)[0]

    def encode_pixels(self, pictures: Sequence[Tensor]) -> EncodedBatch:
        """One pass over prepared pictures; what comes back still lies on the device."""
        x_BCHW = torch.stack(list(pictures))
        if self.device.startswith("cuda"):
            x_BCHW = x_BCHW.pin_memory()
        dtype = torch.bfloat16 if self.config.compute_dtype == "bf16" else torch.float32
        with torch.inference_mode():
            pooled_BD = self._forward(x_BCHW.to(self.device, dtype, non_blocking=True))
            lengths = [0] * len(pictures)
            return encoded_batch({"pooled": pooled_BD}, lengths, self.config.storage_dtype)


def sub_lists(ids: Sequence[int], wanted: Sequence[int]) -> list[tuple[int, ...]]:
    """Indices of every place where `ids` goes on as `wanted` does."""
    length = len(wanted)
    starts = range(len(ids) - length + 1) if length else ()
    return [
        tuple(range(start, start + length))
        for start in starts
        if list(ids[start : start + length]) == list(wanted)
    ]


def load_encoder(config: EncoderConfig, *, device: str = "cpu") -> Encoder:
    """Load an encoder once per process: long-lived workers ask again for every shard.

    Weights that change on disk are loaded anew.

    Raises:
        ValueError: the weights are missing, incomplete or unreachable, or `max_tokens` exceeds
            what the network can read.
    """
    return _loaded(config, device, identity_digest(encoder_identity(config)))


@functools.lru_cache(maxsize=16)
def _loaded(config: EncoderConfig, device: str, identity: str) -> Encoder:
    from ediffi.encoding.open_clip_encoders import OpenClipImageEncoder, OpenClipTextEncoder
    from ediffi.encoding.transformers_encoder import TransformersEncoder

    encoder_class: Callable[[EncoderConfig, str], Encoder] = {
        "transformers": TransformersEncoder,
        "open_clip_text": OpenClipTextEncoder,
        "open_clip_image": OpenClipImageEncoder,
    }[config.family]
    return encoder_class(config, device)


def token_batches(lengths: Sequence[int], budget_tokens: int) -> Iterator[list[int]]:
    """Indices from long to short, cut so that one padded batch stays within the budget.

    A batch also ends where a shorter caption would leave more than a twentieth of it padding, once
    it has a quarter of its tokens. A caption longer than the budget is a batch of its own. Which
    captions meet in a batch follows from their lengths and order alone.
    """
    batch: list[int] = []
    num_tokens = 0  # without padding
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch:
            longest = lengths[batch[0]]
            num_padded = (len(batch) + 1) * longest
            num_padding = num_padded - num_tokens - lengths[index]
            is_loose = num_padding > _MAX_PADDING_FRACTION * num_padded
            is_large = len(batch) * longest >= budget_tokens / 4
            if num_padded > budget_tokens or (is_loose and is_large):
                yield batch
                batch, num_tokens = [], 0
        batch.append(index)
        num_tokens += lengths[index]
    if batch:
        yield batch
