"""Encode every ingested sample once: T5 token states, CLIP text, CLIP image.

One stage an encoder, so that adding one never touches the caches of the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipelines.recipe import Encoder
from pipelines.stage import Json, Manifest, Outcome, Unit, Workspace
from pipelines.stages.inputs import (
    EMBED_PREFIX,
    NULL_UNIT,
    encoder_config,
    image_shards,
    shard_file,
    without,
)

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image
    from torch import Tensor

    from ediffi.encoders import Encoder as LoadedEncoder

PICTURES_PER_CALL = 256  # bounds the memory that decoded pictures take


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Cache one encoder's embeddings. One unit is one shard; `null` is the empty caption."""

    encoder_name: str
    encoder: Encoder
    version: ClassVar[int] = 1
    gang: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return EMBED_PREFIX + self.encoder_name

    @property
    def needs(self) -> tuple[str, ...]:
        return ("ingest", "clip_fit") if self.encoder.is_fitted else ("ingest",)

    def identity(self) -> Json:
        values = without(self.encoder.model_dump(mode="json"), {"dropout"})
        if self.encoder.is_fitted:
            return values
        from ediffi.encoder_weights import weights_identity

        return values | {"weights_identity": weights_identity(encoder_config(self.encoder, {}))}

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        shards = image_shards(inputs["ingest"])
        return [Unit(id=NULL_UNIT), *(Unit(id=receipt.unit) for receipt in shards)]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        from ediffi.encoders import load_encoder

        encoder = load_encoder(
            encoder_config(self.encoder, workspace.inputs), device=workspace.device
        )
        if unit.id == NULL_UNIT:
            return _write_null(encoder, workspace.scratch)
        ingest = workspace.inputs["ingest"]
        receipt = ingest.receipt(unit.id)
        name = receipt.facts["shard"]
        return _write_shard(encoder, ingest.path(shard_file(receipt)), workspace.scratch / name)


def _write_null(encoder: LoadedEncoder, scratch: Path) -> Outcome:
    from ediffi.shards import encode_tensors

    (scratch / "null.safetensors").write_bytes(encode_tensors(encoder.null()))
    widths = {"token_width": encoder.token_width, "pooled_width": encoder.pooled_width}
    return Outcome(files=["null.safetensors"], facts=widths)


def _write_shard(encoder: LoadedEncoder, source: Path, target: Path) -> Outcome:
    """Encode one image shard into one embedding shard of the same name and order."""
    from ediffi.shards import ShardWriter, encode_tensors, read_shard

    rejects: dict[str, list[str]] = defaultdict(list)
    num_in = num_out = 0
    facts: dict[str, Json] = {"shard": target.name}
    samples = list(read_shard(source))
    with ShardWriter(target) as writer:
        for start in range(0, len(samples), PICTURES_PER_CALL):
            part = samples[start : start + PICTURES_PER_CALL]
            num_in += len(part)
            encoded = _encode(encoder, part, rejects, facts)
            for key, tensors in encoded.items():
                if not all(tensor.isfinite().all() for tensor in tensors.values()):
                    rejects["not_finite"].append(key)
                    continue
                writer.write(key, {"safetensors": encode_tensors(tensors)})
                num_out += 1
                _count_tokens(tensors, facts)
    return Outcome(
        files=[target.name], num_in=num_in, num_out=num_out, rejects=rejects, facts=facts
    )


def _encode(
    encoder: LoadedEncoder,
    samples: list[tuple[str, dict[str, bytes]]],
    rejects: dict[str, list[str]],
    facts: dict[str, Json],
) -> dict[str, dict[str, Tensor]]:
    """Embeddings by key; samples that cannot be read are noted in `rejects`."""
    from ediffi.shards import ImageError, caption_of, decode_image, picture_of

    if encoder.kind == "text":
        captions = {key: caption_of(members) for key, members in samples}
        lengths = encoder.num_tokens(list(captions.values()))
        num_cut = sum(length > encoder.config.max_tokens for length in lengths)
        facts["num_truncated"] = facts.get("num_truncated", 0) + num_cut
        return dict(zip(captions, encoder.encode(list(captions.values())), strict=True))
    pictures: dict[str, Image] = {}
    for key, members in samples:
        try:
            pictures[key] = decode_image(picture_of(members))
        except ImageError as error:
            rejects[error.reason].append(key)
    return dict(zip(pictures, encoder.encode(list(pictures.values())), strict=True))


def _count_tokens(tensors: Mapping[str, Tensor], facts: dict[str, Json]) -> None:
    """Keep a histogram of sequence lengths: `tokens` maps a length to its number of samples."""
    if "tokens" in tensors:
        histogram = facts.setdefault("tokens", {})
        length = str(len(tensors["tokens"]))
        histogram[length] = histogram.get(length, 0) + 1
