"""Finished folders of pictures and embeddings, as the shards that the joined reader takes.

A folder is what a stage leaves: tars, `receipts.jsonl` with a line a shard, and `manifest.json`,
which is written last and holds the digest of the receipts. Nothing here needs the pipeline that
made them, nor torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ediffi.encoding.encoder_identity import check_identity, encoder_identity, read_identity
from ediffi.encoding.encoder_weights import EncoderConfig
from ediffi.storage import remote
from ediffi.storage.shard_files import ShardFile, ShardRef

Receipt = Mapping[str, Any]


class CacheError(ValueError):
    """A folder is unfinished or damaged, or folders do not belong together."""


def open_caches(
    images: str | Path,
    embeddings: Mapping[str, str | Path],
    *,
    split: str = "train",
    asked: Mapping[str, EncoderConfig] | None = None,
) -> list[ShardRef]:
    """Pair every image shard of a split with the same-named shard of each embedding cache.

    Args:
        images: folder or URL of a finished `ingest` stage.
        embeddings: stream name -> folder or URL of a finished `embed` stage.
        split: `train` or `held_out`.
        asked: stream name -> the encoder that the reader was made for; streams left out are taken
            as they are.

    Raises:
        CacheError: a folder is unfinished, its receipts are not those of its manifest, or a cache
            was made of other captions or pictures.
        CacheMismatch: a cache was made with another encoder than asked; names each field.
    """
    for name, config in (asked or {}).items():
        check_identity(
            read_identity(embeddings[name]), encoder_identity(config), str(embeddings[name])
        )
    caches = {
        name: {receipt["unit"]: receipt for receipt in _receipts(folder)}
        for name, folder in embeddings.items()
    }
    return [
        ShardRef(
            name=receipt["facts"]["shard"],
            images=_shard_file(images, receipt),
            embeddings={
                name: _shard_file(embeddings[name], _counterpart(receipt, name, receipts))
                for name, receipts in caches.items()
            },
            num_samples=receipt["num_out"],
        )
        for receipt in _receipts(images)
        if receipt["num_out"] and receipt["facts"]["split"] == split
    ]


def _receipts(folder: str | Path) -> list[Receipt]:
    """All receipts of a finished folder, in the order of its units."""
    places = [f"{str(folder).rstrip('/')}/{name}" for name in ("manifest.json", "receipts.jsonl")]
    try:
        manifest_bytes, receipts_bytes = remote.read_files(places)
    except FileNotFoundError as error:
        raise CacheError(
            f"{folder}: must be a finished stage, but {error.filename or error} is missing: run "
            "the recipe that makes it to its end"
        ) from error
    promised = json.loads(manifest_bytes)["contents"]
    if (found := hashlib.sha256(receipts_bytes).hexdigest()) != promised:
        raise CacheError(
            f"{places[1]}: sha256 must be {promised[:16]}... as in manifest.json, found "
            f"{found[:16]}...: copy the folder again, or run `ediffi cache repair`"
        )
    return [json.loads(line) for line in receipts_bytes.splitlines()]


def _counterpart(pictures: Receipt, stream: str, receipts: Mapping[str, Receipt]) -> Receipt:
    """The embedding shard of an image shard, made of the same captions or pictures."""
    unit = pictures["unit"]
    if unit not in receipts:
        raise CacheError(
            f"{stream}: no embeddings of {pictures['facts']['shard']}: the cache was made "
            "of other image shards; embed these"
        )
    for kind, digest in receipts[unit]["facts"].get("digests", {}).items():
        if (ours := pictures["facts"].get("digests", {}).get(kind)) != digest:
            raise CacheError(
                f"{stream}: {pictures['facts']['shard']} was made of other {kind}: their digest "
                f"must be {str(ours)[:16]}..., found {digest[:16]}...; embed the shard again"
            )
    return receipts[unit]


def _shard_file(folder: str | Path, receipt: Receipt) -> ShardFile:
    tar = next(file for file in receipt["files"] if file["path"].endswith(".tar"))
    indexes = [file for file in receipt["files"] if file["path"].endswith(".index.json")]
    return ShardFile(
        location=_place(folder, tar["path"]),
        num_bytes=tar["num_bytes"],
        sha256=tar["sha256"],
        index_location=_place(folder, indexes[0]["path"]) if indexes else None,
    )


def _place(folder: str | Path, path: str) -> str:
    """Where a file lies: adopted ones are named by a place of their own."""
    is_own = path.startswith("/") or remote.is_remote(path)
    return path if is_own else f"{str(folder).rstrip('/')}/{path}"
