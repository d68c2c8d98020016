"""Digests of what a shard holds, apart by what depends on it.

A cache of text embeddings is stale when a caption or a key changes, one of image embeddings when a
picture or a key does; neither when the tar was merely packed anew.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any


@dataclass
class ShardDigests:
    """Digests over the samples of one shard, in their order."""

    _captions: Any = field(default_factory=hashlib.sha256)
    _pictures: Any = field(default_factory=hashlib.sha256)

    def add(self, key: str, caption: bytes, picture: bytes) -> None:
        """Take in one sample: its key, and the bytes of its caption and of its picture's file."""
        name = key.encode()
        for digest, content in ((self._captions, caption), (self._pictures, picture)):
            digest.update(len(name).to_bytes(4, "big") + name + hashlib.sha256(content).digest())

    def facts(self) -> dict[str, str]:
        """`captions` and `pictures`, as hex digits."""
        return {"captions": self._captions.hexdigest(), "pictures": self._pictures.hexdigest()}
