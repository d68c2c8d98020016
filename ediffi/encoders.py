"""Frozen encoders: T5 and its kin through transformers, CLIP text and image through open_clip.

eDiff-I section 5 conditions on T5-XXL token states, on CLIP ViT-L/14 text token states with their
pooled vector, and on the pooled CLIP image embedding, all computed once and off line. Small local
weights run through the same classes. Importing this module needs no torch: planning imports it.

Shape legend: B batch, T tokens, D width.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from ediffi.encoder_weights import EncoderConfig, local_weights, weights_identity

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

__all__ = ["Encoder", "EncoderConfig", "clip_text_states", "load_encoder", "weights_identity"]

_BATCH_TOKENS = 8192  # padded tokens per pass: 0.5 GB of T5-XXL feed-forward activations in bf16
_BATCH_IMAGES = 64


class Encoder(ABC):
    """A frozen network that turns captions or pictures into the tensors of one stream."""

    kind: Literal["text", "image"]
    token_width: int  # D of "tokens"; 0: the stream has none
    pooled_width: int  # D of "pooled"; 0: the stream has none

    def __init__(self, config: EncoderConfig, device: str) -> None:
        """Keep what every encoder needs; subclasses load their network."""
        self.config = config
        self.device = device

    @abstractmethod
    def encode(self, batch: Sequence[Any]) -> list[dict[str, Tensor]]:
        """Encode captions (str) or RGB pictures (PIL), in order.

        Returns:
            Per sample {"tokens": (T, D)}, {"tokens": (T, D), "pooled": (D,)} or
            {"pooled": (D,)}, on the CPU in the storage dtype. T is the caption's own number of
            tokens under `pad: drop` and `max_tokens` under `pad: keep`. Beyond rounding, no
            result depends on the rest of the batch.
        """

    @abstractmethod
    def null(self) -> dict[str, Tensor]:
        """Stand-in for a missing input: the encoding of "" for text, zeros for a picture."""

    @abstractmethod
    def num_tokens(self, batch: Sequence[Any]) -> list[int]:
        """Tokens of each input before truncation, special ones included; 0 for a picture."""

    def _stored(self, x: Tensor) -> Tensor:
        # A copy, so that one sample does not keep its whole batch alive.
        return x.to(device="cpu", dtype=_torch_dtype(self.config.storage_dtype), copy=True)


class _TextEncoder(Encoder):
    """Buckets captions by length; subclasses tokenize and run the network."""

    kind = "text"
    pad_id = 0

    @abstractmethod
    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids cut to max_tokens, still ending as the network was taught."""

    @abstractmethod
    def _forward(self, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor | None]:
        """Token states (B, T, D) and, where the network has one, the pooled vector (B, D)."""

    def encode(self, batch: Sequence[str]) -> list[dict[str, Tensor]]:
        if isinstance(batch, str):
            raise ValueError(f"encode takes a sequence of captions, got the one string {batch!r}")
        ids = self._token_ids(list(batch))
        encoded: dict[int, dict[str, Tensor]] = {}
        for indices in _buckets([len(row) for row in ids]):
            encoded.update(zip(indices, self._encode_ids([ids[i] for i in indices])))
        return [encoded[i] for i in range(len(ids))]

    def null(self) -> dict[str, Tensor]:
        return self.encode([""])[0]

    def _encode_ids(self, ids: list[list[int]]) -> list[dict[str, Tensor]]:
        """One forward pass over captions of similar length."""
        import torch

        keep = self.config.pad == "keep"
        num_columns = self.config.max_tokens if keep else max(len(row) for row in ids)
        ids_BT = torch.full((len(ids), num_columns), self.pad_id)
        mask_BT = torch.zeros(len(ids), num_columns, dtype=torch.long)
        for i, row in enumerate(ids):
            ids_BT[i, : len(row)] = torch.tensor(row)
            mask_BT[i, : len(row)] = 1
        with torch.inference_mode():
            states_BTD, pooled_BD = self._forward(ids_BT.to(self.device), mask_BT.to(self.device))
            samples = []
            for i, row in enumerate(ids):
                num_stored = num_columns if keep else len(row)
                samples.append({"tokens": self._stored(states_BTD[i, :num_stored])})
                if pooled_BD is not None:
                    samples[i]["pooled"] = self._stored(pooled_BD[i])
        return samples

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


class TransformersEncoder(_TextEncoder):
    """Last hidden states of a transformers model; of T5 and its kin, the encoder half."""

    def __init__(self, config: EncoderConfig, device: str) -> None:
        """Load tokenizer and network; ValueError when either cannot be had."""
        super().__init__(config, device)
        import transformers

        source = str(local_weights(config) or config.weights)
        with _explained(config):
            architecture = transformers.AutoConfig.from_pretrained(source)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            network_class = {
                "t5": transformers.T5EncoderModel,
                "mt5": transformers.MT5EncoderModel,
                "umt5": transformers.UMT5EncoderModel,
            }.get(architecture.model_type, transformers.AutoModel)
            dtype = _torch_dtype(config.compute_dtype)
            self.network = network_class.from_pretrained(source, dtype=dtype)
        self.network.to(device).eval().requires_grad_(False)
        self.pad_id = self.tokenizer.pad_token_id or 0
        # Relative positions (T5) set no limit of their own.
        self._measure(getattr(architecture, "max_position_embeddings", config.max_tokens))

    def num_tokens(self, batch: Sequence[str]) -> list[int]:
        return [len(row) for row in self.tokenizer(list(batch), verbose=False)["input_ids"]]

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoding = self.tokenizer(texts, truncation=True, max_length=self.config.max_tokens)
        return encoding["input_ids"]

    def _forward(self, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, None]:
        return self.network(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state, None


class OpenClipTextEncoder(_TextEncoder):
    """Token states of CLIP's text tower up to the end token, and its normalised embedding."""

    def __init__(self, config: EncoderConfig, device: str) -> None:
        """Load the model; ValueError when it cannot be had or its text tower is not causal."""
        super().__init__(config, device)
        import open_clip

        self.network, _ = _open_clip_model(config, device)
        self.tokenizer = open_clip.get_tokenizer(_open_clip_name(config))
        causal = isinstance(self.network, open_clip.CLIP) and self.network.attn_mask is not None
        if not (causal and isinstance(self.tokenizer, open_clip.SimpleTokenizer)):
            raise ValueError(
                "weights and model must name a CLIP with OpenAI's tokenizer and a causal text "
                f"tower, got {config.weights!r} {config.model!r}: choose one such as ViT-L-14"
            )
        self._measure(self.network.context_length)

    def num_tokens(self, batch: Sequence[str]) -> list[int]:
        return [len(self.tokenizer.encode(text)) + 2 for text in batch]

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        start, end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        longest = self.config.max_tokens - 2
        return [[start, *self.tokenizer.encode(text)[:longest], end] for text in texts]

    def _forward(self, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        return clip_text_states(self.network, ids_BT)


class OpenClipImageEncoder(Encoder):
    """CLIP's normalised image embedding."""

    kind = "image"
    token_width = 0

    def __init__(self, config: EncoderConfig, device: str) -> None:
        """Load the model; ValueError when it cannot be had."""
        super().__init__(config, device)
        from PIL import Image

        self.network, self.preprocess = _open_clip_model(config, device)
        blank = self.encode([Image.new("RGB", (8, 8))])[0]
        self.pooled_width = blank["pooled"].shape[-1]

    def encode(self, batch: Sequence[Image]) -> list[dict[str, Tensor]]:
        import torch

        dtype = _torch_dtype(self.config.compute_dtype)
        encoded = []
        for start in range(0, len(batch), _BATCH_IMAGES):
            pictures = [self.preprocess(p.convert("RGB")) for p in batch[start:][:_BATCH_IMAGES]]
            with torch.inference_mode():
                x_BCHW = torch.stack(pictures).to(self.device, dtype)
                pooled_BD = self.network.encode_image(x_BCHW, normalize=True)
                encoded += [{"pooled": self._stored(pooled_D)} for pooled_D in pooled_BD]
        return encoded

    def null(self) -> dict[str, Tensor]:
        import torch

        return {"pooled": self._stored(torch.zeros(self.pooled_width))}

    def num_tokens(self, batch: Sequence[Image]) -> list[int]:
        return [0] * len(batch)


@functools.lru_cache(maxsize=16)
def load_encoder(config: EncoderConfig, *, device: str = "cpu") -> Encoder:
    """Load an encoder once per process: long-lived workers ask again for every shard.

    Raises:
        ValueError: the weights are missing, incomplete or unreachable, or `max_tokens` exceeds
            what the network can read.
    """
    encoder_class: Callable[[EncoderConfig, str], Encoder] = {
        "transformers": TransformersEncoder,
        "open_clip_text": OpenClipTextEncoder,
        "open_clip_image": OpenClipImageEncoder,
    }[config.family]
    return encoder_class(config, device)


def clip_text_states(network: Any, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Run the text tower of an open_clip CLIP on captions padded to any common length.

    open_clip always pads to the full context; the tower is causal, so the columns after the end
    token change nothing and leaving them out is several times faster for short captions.

    Args:
        network: an `open_clip.CLIP` with a causal text tower.
        ids_BT: token ids, at most context_length columns; the end token has the largest id.

    Returns:
        States after the final layer norm (B, T, D) and the normalised embedding (B, D).
    """
    from open_clip.transformer import text_global_pool
    from torch.nn import functional as F

    num_columns = ids_BT.shape[1]
    dtype = network.transformer.get_cast_dtype()
    x_BTD = network.token_embedding(ids_BT).to(dtype)
    x_BTD = x_BTD + network.positional_embedding[:num_columns].to(dtype)
    mask_TT = network.attn_mask[:num_columns, :num_columns]
    x_BTD = network.ln_final(network.transformer(x_BTD, attn_mask=mask_TT))
    pooled_BD = text_global_pool(x_BTD, ids_BT, network.text_pool_type, network.text_eos_id)
    if network.text_projection is not None:
        pooled_BD = pooled_BD @ network.text_projection
    return x_BTD, F.normalize(pooled_BD, dim=-1)


def _buckets(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices from short to long, cut so that one padded batch stays within _BATCH_TOKENS."""
    bucket: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if bucket and (len(bucket) + 1) * lengths[index] > _BATCH_TOKENS:
            yield bucket
            bucket = []
        bucket.append(index)
    if bucket:
        yield bucket


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def _open_clip_name(config: EncoderConfig) -> str:
    """What open_clip calls the model: a directory, a hub repository, or an architecture."""
    path = local_weights(config)
    if path is not None and path.is_dir():
        return f"local-dir:{path}"
    if config.weights.startswith("hf-hub:"):
        return config.weights
    if not config.model:
        raise ValueError(
            f"model must name an open_clip architecture for weights {config.weights!r}, "
            "got nothing: for example ViT-L-14 for the tag openai"
        )
    return config.model


def _open_clip_model(config: EncoderConfig, device: str) -> tuple[Any, Any]:
    name = _open_clip_name(config)
    pretrained = config.weights if name == config.model else None
    with _explained(config):
        return _cached_open_clip_model(name, pretrained, config.compute_dtype, device)


@functools.lru_cache(maxsize=8)
def _cached_open_clip_model(
    name: str, pretrained: str | None, precision: str, device: str
) -> tuple[Any, Any]:
    """Network and picture transform, shared by the text and the image encoder."""
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


@contextmanager
def _explained(config: EncoderConfig) -> Iterator[None]:
    """Turn a library's loading failure into a ValueError that says what to do."""
    try:
        yield
    except (OSError, ImportError, KeyError, RuntimeError, ValueError) as error:
        library = config.family.removesuffix("_text").removesuffix("_image")
        remedy = (
            "on a machine without network, download the model once elsewhere and set weights to "
            "its directory, or fill the cache at HF_HOME"
            if local_weights(config) is None
            else "check that its files are complete and of one model"
        )
        cause = str(error).strip().split("\n", 1)[0]
        raise ValueError(
            f"weights must be a model that {library} can load, got {config.weights!r} "
            f"{config.model!r} ({type(error).__name__}: {cause}): {remedy}"
        ) from error
