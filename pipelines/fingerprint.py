"""Content addresses of stages, and words for what changed between two of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipelines.stage import Json, Stage

NUM_HEX_DIGITS = 16  # 64 bits: collisions are out of reach for any number of runs


def canonical(value: Json) -> bytes:
    """Serialise JSON so that equal values give equal bytes. Raises TypeError for anything else."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def fingerprint(stage: Stage, inputs: Mapping[str, str]) -> str:
    """Address of a stage: its name, version, identity and the fingerprints of its inputs."""
    document = {
        "stage": stage.name,
        "version": stage.version,
        "identity": stage.identity(),
        "inputs": dict(inputs),
    }
    return hashlib.sha256(canonical(document)).hexdigest()[:NUM_HEX_DIGITS]


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def changes(before: Json, after: Json) -> list[str]:
    """Say which values differ, one line a leaf: `lr: 0.0001 -> 0.0003`."""
    old, new = dict(flatten(before)), dict(flatten(after))
    return [
        f"{name}: {_show(old, name)} -> {_show(new, name)}"
        for name in sorted(old.keys() | new.keys())
        if _text(old, name) != _text(new, name)  # whole: long values may differ at their ends
    ]


def flatten(value: Json, prefix: str = "") -> Iterator[tuple[str, Json]]:
    """Leaves of nested mappings under dotted names."""
    if isinstance(value, Mapping) and (value or not prefix):
        for name, inner in value.items():
            yield from flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value


def _show(leaves: Mapping[str, Json], name: str) -> str:
    text = _text(leaves, name)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(leaves: Mapping[str, Json], name: str) -> str:
    return json.dumps(leaves[name], sort_keys=True) if name in leaves else "absent"
