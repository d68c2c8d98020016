"""Encode every ingested sample once: T5 token states, CLIP text, CLIP image.

One stage an encoder, so that adding one never touches the caches of the others. Beside the tars
lies `encoder.json`, which says what they were made with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from pipelines.recipe import Encoder
from pipelines.stage import File, Json, Manifest, Outcome, Receipt, Unit, Workspace
from pipelines.stages.embed_budget import check_receipts
from pipelines.stages.inputs import (
    EMBED_PREFIX,
    NULL_UNIT,
    encoder_config,
    image_shards,
    shard_file,
)
from pipelines.store.fingerprint import settings_digest, unit_key

if TYPE_CHECKING:
    from ediffi.encoders import Encoder as LoadedEncoder

MAX_DECODING_THREADS = 8


def digest_kind(encoder: Encoder) -> str:
    """Which of an image shard's digests an encoder's embeddings depend on."""
    return "pictures" if encoder.is_image else "captions"


def asked_identity(encoder: Encoder) -> dict[str, str | int]:
    """What a recipe asks of an encoder; weights that are still to be fitted are only named.

    Raises:
        ValueError: its weights are missing, or its settings contradict each other.
    """
    from ediffi.encoding.encoder_identity import encoder_identity
    from ediffi.encoding.encoder_weights import EncoderConfig

    values = {field.name: getattr(encoder, field.name) for field in fields(EncoderConfig)}
    return encoder_identity(EncoderConfig(**values))


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Cache one encoder's embeddings. One unit is one shard; `null` is the empty caption."""

    encoder_name: str
    encoder: Encoder
    max_pixels: int = 64_000_000  # of one picture; ingest has refused larger ones already
    version: ClassVar[int] = 2
    gang: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return EMBED_PREFIX + self.encoder_name

    @property
    def needs(self) -> tuple[str, ...]:
        return ("ingest", "clip_fit") if self.encoder.is_fitted else ("ingest",)

    def identity(self) -> Json:
        return asked_identity(self.encoder)

    def plan(self, inputs: Mapping[str, Manifest]) -> Iterator[Unit]:
        """The empty caption, then one unit a shard with all that a worker needs to know of it."""
        from ediffi.encoding.encoder_identity import encoder_identity

        identity = encoder_identity(encoder_config(self.encoder, inputs))
        settings = settings_digest({"version": self.version, "encoder": identity})
        kind = digest_kind(self.encoder)
        yield Unit(id=NULL_UNIT, key=unit_key(settings))
        for receipt in image_shards(inputs["ingest"]):
            digest = receipt.facts["digests"][kind]
            yield Unit(
                id=receipt.unit,
                key=unit_key(settings, **{kind: digest}),
                arguments={
                    "shard": receipt.facts["shard"],
                    "file": vars(shard_file(receipt)),
                    "num_samples": receipt.num_out,
                    "digests": {kind: digest},
                },
            )

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        """Encode one shard. Raises ShardError if it is not the one that was ingested."""
        from ediffi.encoders import load_encoder
        from ediffi.encoding.encoder_identity import encoder_identity, identity_digest

        config = encoder_config(self.encoder, workspace.inputs)
        encoder = load_encoder(config, device=workspace.device)
        identity = encoder_identity(config)
        made_with = {"encoder": identity_digest(identity)}
        if encoder.revision:
            made_with["revision"] = encoder.revision
        if unit.id == NULL_UNIT:
            return _write_null(encoder, identity, made_with, workspace)
        return self._write_shard(encoder, made_with, unit, workspace)

    def _write_shard(
        self, encoder: LoadedEncoder, made_with: Json, unit: Unit, workspace: Workspace
    ) -> Outcome:
        import torch

        from ediffi.encoding.embedding import embed_shard
        from ediffi.storage.tar_index import ShardError, write_index

        arguments = unit.arguments
        source = workspace.inputs["ingest"].local_path(File(**arguments["file"]))
        if (num_bytes := source.stat().st_size) != arguments["file"]["num_bytes"]:
            raise ShardError(
                f"{source}: must be the {arguments['file']['num_bytes']} bytes that were ingested, "
                f"found {num_bytes}: put the shard back, or run ingest anew"
            )
        target = workspace.scratch / arguments["shard"]
        report = embed_shard(
            encoder,
            source,
            target,
            max_pixels=self.max_pixels,
            num_threads=min(MAX_DECODING_THREADS, torch.get_num_threads()),
        )
        if report.num_in != arguments["num_samples"]:
            raise ShardError(
                f"{source}: must hold the {arguments['num_samples']} samples that were ingested, "
                f"found {report.num_in}: put the shard back, or run ingest anew"
            )
        index = target.with_suffix(".index.json")
        write_index(target, index)
        about = {"shard": target.name, "digests": dict(arguments["digests"]), **made_with}
        return Outcome(
            files=[target.name, index.name],
            num_in=report.num_in,
            num_out=report.num_out,
            rejects=report.rejects,
            flagged=report.flagged,
            facts={**about, **report.facts},
            timings=report.timings,
        )

    def check(self, receipts: Iterable[Receipt]) -> None:
        """Judge all units together, reading the receipts once.

        Raises:
            StageFailed: too many samples were rejected, or units were made with different commits
                of a hub name that moved meanwhile.
        """
        check_receipts(receipts, self.encoder_name, self.encoder)


def _write_null(
    encoder: LoadedEncoder, identity: Mapping[str, str | int], made_with: Json, workspace: Workspace
) -> Outcome:
    from ediffi.encoding.encoder_identity import IDENTITY_FILE, identity_json
    from ediffi.storage.shard_format import encode_tensors

    scratch = workspace.scratch
    (scratch / "null.safetensors").write_bytes(encode_tensors(encoder.null()))
    (scratch / IDENTITY_FILE).write_text(identity_json(identity), encoding="utf-8")
    widths = {"token_width": encoder.token_width, "pooled_width": encoder.pooled_width}
    return Outcome(files=["null.safetensors", IDENTITY_FILE], facts={**widths, **made_with})
