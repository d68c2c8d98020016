"""The conditioning of one batch: T5, CLIP text and CLIP image streams (paper section 3).

A *stream* is what one encoder says about each picture of the batch: a padded token sequence, a
pooled vector, or both. Training drops streams independently, per sample; a dropped stream is
zeroed whole and fully masked, which makes `Conditioning.null()`, the unconditional branch of
classifier-free guidance, exactly an input that training has seen.

A stream may also be *painted* (paper section 5): where in the picture each of its tokens is
wanted. Only the conditional branch knows of that: null() forgets it.

Shapes: B batch, T tokens, D width, H W painting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ediffi.paint_planes import check_paint, resize_paint


def check_json_keys(config_class: type, data: Mapping[str, Any]) -> None:
    """Raise ValueError if `data` has a key that is no field of the dataclass `config_class`."""
    valid = [field.name for field in fields(config_class)]
    if unknown := sorted(set(data) - set(valid)):
        raise ValueError(
            f"{config_class.__name__} has no field {', '.join(unknown)}; "
            f"remove it or use one of: {', '.join(valid)}"
        )


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What one encoder delivers, and how often training drops it."""

    name: str  # "t5", "clip_text", "clip_image"
    token_width: int = 0  # width of each token; 0: the stream has no tokens
    pooled_width: int = 0  # width of the pooled vector; 0: the stream has none
    pooled_as_token: bool = False  # the pooled vector is also a cross-attention token (CLIP image)
    dropout: float = 0.0  # probability that training drops the stream, in [0, 1]

    def __post_init__(self) -> None:
        if not self.name.isidentifier():  # it names a submodule of the network
            raise ValueError(f"stream name must be an identifier such as t5, got {self.name!r}")
        for field in ("token_width", "pooled_width"):
            if getattr(self, field) < 0:
                raise ValueError(
                    f"{field} of stream {self.name} must be 0 (absent) or positive, "
                    f"got {getattr(self, field)}"
                )
        if not (self.token_width or self.pooled_width):
            raise ValueError(
                f"stream {self.name} must have tokens or a pooled vector, got neither; "
                "set token_width or pooled_width"
            )
        if self.pooled_as_token and not self.pooled_width:
            raise ValueError(
                f"stream {self.name} has pooled_as_token but no pooled vector; set pooled_width"
            )
        if not 0.0 <= self.dropout <= 1.0:
            raise ValueError(
                f"dropout of stream {self.name} must lie in [0, 1], got {self.dropout}"
            )

    @property
    def has_context(self) -> bool:
        """Whether the stream gives cross-attention anything to attend to."""
        return bool(self.token_width) or self.pooled_as_token

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StreamConfig:
        """Read what `to_json` wrote; ValueError on an unknown field."""
        check_json_keys(cls, data)
        return cls(**data)


@dataclass(eq=False)
class Stream:
    """One encoder's output for a batch; tokens and mask are both present or both absent."""

    tokens_BTD: Tensor | None = None
    mask_BT: Tensor | None = None  # bool, True = real token
    pooled_BD: Tensor | None = None
    paint_BTHW: Tensor | None = None  # w' A: each token's weight at each pixel, of any H and W

    def __post_init__(self) -> None:
        if self.paint_BTHW is not None:
            check_paint(self.paint_BTHW, self.tokens_BTD)
        if (self.tokens_BTD is None) != (self.mask_BT is None):
            raise ValueError("a stream must have tokens_BTD and mask_BT together, got only one")
        if self.tokens_BTD is not None and self.mask_BT is not None:
            if self.mask_BT.dtype != torch.bool:
                raise ValueError(f"mask_BT must be bool (True = real), got {self.mask_BT.dtype}")
            if self.mask_BT.shape != self.tokens_BTD.shape[:2]:
                raise ValueError(
                    f"mask_BT must have the shape {tuple(self.tokens_BTD.shape[:2])} of its "
                    f"tokens, got {tuple(self.mask_BT.shape)}"
                )

    def map(self, function: Callable[[Tensor], Tensor]) -> Stream:
        """Apply `function` to each tensor that is present."""
        parts = (self.tokens_BTD, self.mask_BT, self.pooled_BD, self.paint_BTHW)
        return Stream(*(None if part is None else function(part) for part in parts))

    def drop(self, keep_B: Tensor) -> Stream:
        """Zero every tensor of every sample whose `keep_B` is False."""

        def zero(part: Tensor) -> Tensor:
            dropped = ~keep_B.to(part.device).view(-1, *[1] * (part.ndim - 1))
            return part.masked_fill(dropped, 0)

        return self.map(zero)

    def pad(self, num_tokens: int) -> Stream:
        """Pad the token sequence to `num_tokens` with masked zeros."""
        if self.tokens_BTD is None or self.mask_BT is None:
            return self
        missing = num_tokens - self.tokens_BTD.shape[1]
        return Stream(
            functional.pad(self.tokens_BTD, (0, 0, 0, missing)),
            functional.pad(self.mask_BT, (0, missing)),
            self.pooled_BD,
            None
            if self.paint_BTHW is None
            else functional.pad(self.paint_BTHW, (0, 0, 0, 0, 0, missing)),
        )

    def without_paint(self) -> Stream:
        """Return the stream as it is without a painting."""
        return Stream(self.tokens_BTD, self.mask_BT, self.pooled_BD)


@dataclass(eq=False)
class Conditioning:
    """The streams of one batch, by name. Every method returns a new object.

    `batch_size` is explicit so that an unconditional model (no streams) has one too. What a
    super-resolution model enlarges is no stream: nothing drops it.
    """

    streams: dict[str, Stream]
    batch_size: int
    low_res_BCHW: Tensor | None = None  # pictures in [-1, 1] to be enlarged, (B, 3, h, w)

    def __post_init__(self) -> None:
        if self.low_res_BCHW is not None and len(self.low_res_BCHW) != self.batch_size:
            raise ValueError(
                f"low_res_BCHW must have batch_size {self.batch_size}, got {len(self.low_res_BCHW)}"
            )
        for name, stream in self.streams.items():
            for part in (stream.tokens_BTD, stream.mask_BT, stream.pooled_BD, stream.paint_BTHW):
                if part is not None and len(part) != self.batch_size:
                    raise ValueError(
                        f"stream {name} must have batch_size {self.batch_size}, got {len(part)}"
                    )

    def _map(self, function: Callable[[Tensor], Tensor], batch_size: int) -> Conditioning:
        streams = {name: stream.map(function) for name, stream in self.streams.items()}
        low_res_BCHW = None if self.low_res_BCHW is None else function(self.low_res_BCHW)
        return Conditioning(streams, batch_size, low_res_BCHW)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Conditioning:
        """Move to `device`; `dtype` applies to tokens, vectors and pictures, masks stay bool."""

        def move(part: Tensor) -> Tensor:
            return part.to(device=device, dtype=dtype if part.is_floating_point() else None)

        return self._map(move, self.batch_size)

    def select(self, index_B: Tensor) -> Conditioning:
        """Pick samples by an integer index tensor or a bool mask (B,)."""
        index_B = torch.arange(self.batch_size, device=index_B.device)[index_B]
        return self._map(lambda part: part[index_B.to(part.device)], len(index_B))

    def repeat(self, num_copies: int) -> Conditioning:
        """Repeat the whole batch: samples a, b become a, b, a, b."""
        return self._map(
            lambda part: part.repeat(num_copies, *[1] * (part.ndim - 1)),
            self.batch_size * num_copies,
        )

    @staticmethod
    def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
        """Join batches, padding shorter token sequences; ValueError if they hold other things.

        A stream that only some batches have painted gets blank paint in the others; paintings of
        different sizes are brought to the largest.
        """
        names = [list(part.streams) for part in parts]
        if not parts or any(sorted(other) != sorted(names[0]) for other in names):
            raise ValueError(f"conditionings to join must have the same streams, got {names}")
        streams = {name: _join(name, [part.streams[name] for part in parts]) for name in names[0]}
        low_res_BCHW = _join_present(
            [part.low_res_BCHW for part in parts], "only some batches have low_res_BCHW"
        )
        return Conditioning(streams, sum(part.batch_size for part in parts), low_res_BCHW)

    def drop(self, keep: Mapping[str, Tensor]) -> Conditioning:
        """Drop streams per sample: `keep[name]` is bool (B,); streams not named are kept."""
        if unknown := sorted(set(keep) - set(self.streams)):
            raise ValueError(
                f"cannot drop {', '.join(unknown)}: the streams are {', '.join(self.streams)}"
            )
        streams = {
            name: stream.drop(keep[name]) if name in keep else stream
            for name, stream in self.streams.items()
        }
        return Conditioning(streams, self.batch_size, self.low_res_BCHW)

    def without(self, names: Iterable[str]) -> Conditioning:
        """Drop whole streams, for every sample."""
        nobody_B = torch.zeros(self.batch_size, dtype=torch.bool)
        return self.drop(dict.fromkeys(names, nobody_B))

    def without_paint(self) -> Conditioning:
        """Return the conditioning as it is without paintings."""
        return self._map_streams(Stream.without_paint)

    def null(self) -> Conditioning:
        """Drop every stream of every sample: what the unconditional branch is given.

        It is never painted: guidance then points towards the painting.
        """
        return self._map_streams(lambda stream: stream.without_paint().map(torch.zeros_like))

    def _map_streams(self, function: Callable[[Stream], Stream]) -> Conditioning:
        streams = {name: function(stream) for name, stream in self.streams.items()}
        return Conditioning(streams, self.batch_size, self.low_res_BCHW)


def _join(name: str, streams: Sequence[Stream]) -> Stream:
    """Concatenate one stream of several batches along the batch."""
    lengths = [0 if stream.tokens_BTD is None else stream.tokens_BTD.shape[1] for stream in streams]
    padded = [stream.pad(max(lengths)) for stream in streams]
    problem = f"stream {name} has tokens or pooled vectors in only some batches"
    return Stream(
        _join_present([stream.tokens_BTD for stream in padded], problem),
        _join_present([stream.mask_BT for stream in padded], problem),
        _join_present([stream.pooled_BD for stream in padded], problem),
        _join_paint(padded),
    )


def _join_paint(streams: Sequence[Stream]) -> Tensor | None:
    """Concatenate the paint of padded streams: blank where there is none, all of one size."""
    painted = [stream.paint_BTHW for stream in streams if stream.paint_BTHW is not None]
    if not painted:
        return None
    size = (max(paint.shape[2] for paint in painted), max(paint.shape[3] for paint in painted))
    parts = []
    for stream in streams:
        if stream.paint_BTHW is None:
            assert stream.tokens_BTD is not None, "the other parts have tokens"
            parts.append(painted[0].new_zeros(*stream.tokens_BTD.shape[:2], *size))
        else:
            parts.append(resize_paint(stream.paint_BTHW, size))
    return torch.cat(parts)


def _join_present(parts: Sequence[Tensor | None], problem: str) -> Tensor | None:
    """Concatenate tensors that are all there or all absent; ValueError with `problem` else."""
    present = [part for part in parts if part is not None]
    if present and len(present) < len(parts):
        raise ValueError(problem)
    return torch.cat(present) if present else None


def collate(
    samples: Sequence[Mapping[str, Mapping[str, Tensor]]], configs: Sequence[StreamConfig]
) -> Conditioning:
    """Batch cached embeddings, in their stored dtype, padding ragged tokens with masked zeros.

    `samples[i][name]` holds "tokens" (T_i, D) and "pooled" (D,), as the stream's config demands.
    A sample without a stream gets it dropped. ValueError names sample, stream, required and found
    shape when a tensor is missing or has another width; streams without a config are ignored.
    """
    if not samples:
        raise ValueError("collate needs at least one sample, got none")
    streams = {}
    for config in configs:
        given = [sample.get(config.name) for sample in samples]
        stream = Stream()
        if config.token_width:
            stream = _pad_tokens(_members(given, config, "tokens"), config.token_width)
        if config.pooled_width:
            vectors = _members(given, config, "pooled")
            stream.pooled_BD = torch.stack(_fill(vectors, (config.pooled_width,)))
        streams[config.name] = stream
    return Conditioning(streams, len(samples))


def _members(
    given: Iterable[Mapping[str, Tensor] | None], config: StreamConfig, member: str
) -> list[Tensor | None]:
    """Fetch one checked tensor per sample; None where the sample lacks the stream."""
    required = f"(T, {config.token_width})" if member == "tokens" else f"({config.pooled_width},)"
    width, num_dims = (config.token_width, 2) if member == "tokens" else (config.pooled_width, 1)
    tensors: list[Tensor | None] = []
    for sample_index, stream in enumerate(given):
        tensor = None if stream is None else stream.get(member)
        if stream is not None and tensor is None:
            raise ValueError(
                f"sample {sample_index}: stream {config.name} must have {member} {required}, "
                f"got only {', '.join(stream) or 'nothing'}; embed it again or mend the config"
            )
        if tensor is not None and (tensor.ndim != num_dims or tensor.shape[-1] != width):
            raise ValueError(
                f"sample {sample_index}: {member} of stream {config.name} must have shape "
                f"{required}, got {tuple(tensor.shape)}; the cache comes from another encoder "
                "than the network's streams expect"
            )
        tensors.append(tensor)
    return tensors


def _fill(tensors: Sequence[Tensor | None], shape: tuple[int, ...]) -> list[Tensor]:
    """Replace each None by zeros of `shape`, in the dtype of the others."""
    dtype = next((tensor.dtype for tensor in tensors if tensor is not None), torch.float32)
    return [torch.zeros(shape, dtype=dtype) if tensor is None else tensor for tensor in tensors]


def _pad_tokens(tensors: Sequence[Tensor | None], width: int) -> Stream:
    """Stack ragged (T_i, D) sequences into (B, T, D) and its mask."""
    tokens = _fill(tensors, (0, width))
    lengths_B = torch.tensor([len(sequence) for sequence in tokens])
    mask_BT = torch.arange(int(lengths_B.max()))[None] < lengths_B[:, None]
    return Stream(torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True), mask_BT)
