"""What a reader is told about shards before it opens any: where they lie and what they must hold.

Needs no torch: a pipeline can describe the shards of a run without importing it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One tar, local or remote.

    Attributes:
        location: a path, or a URL that fsspec knows, such as `s3://bucket/key`.
        num_bytes: its recorded size; 0: unknown, not checked.
        sha256: its recorded digest, as hexadecimal digits; "": unknown, not checked.
        index_location: its sidecar, see `tar_index.write_index`; None: there is none, so that the
            headers are scanned.
    """

    location: str | Path
    num_bytes: int = 0
    sha256: str = ""
    index_location: str | Path | None = None

    def __post_init__(self) -> None:
        if self.num_bytes < 0:
            raise ValueError(
                f"num_bytes of {self.location} must be at least 0, got {self.num_bytes}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRef:
    """One shard: the tar of pictures and captions, and a tar of embeddings per stream."""

    name: str
    images: ShardFile
    embeddings: Mapping[str, ShardFile]  # stream name -> tar
    num_samples: int  # pictures that the receipt of `images` promises

    def __post_init__(self) -> None:
        if self.num_samples < 0:
            raise ValueError(
                f"num_samples of shard {self.name!r} must be at least 0, got {self.num_samples}"
            )

    def files(self) -> Iterator[ShardFile]:
        """All tars of the shard, the pictures first."""
        yield self.images
        yield from self.embeddings.values()
