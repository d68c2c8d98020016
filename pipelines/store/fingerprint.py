"""Content addresses of stages, and words for what changed between two of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipelines.stage import Json, Stage

NUM_HEX_DIGITS = 16  # 64 bits: collisions are out of reach for any number of runs
NUM_KEY_DIGITS = 32  # 128 bits: there may be billions of units


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


def unit_key(settings: Json, **parts: Json) -> str:
    """Name everything that decides one unit's bytes: `settings:1f0c... captions:88ab...`.

    Args:
        settings: of the stage, its version included, as far as they touch a single unit.
        parts: what the unit reads, such as the digest of its shard, under words for people.
    """
    return " ".join(
        f"{name}:{_short(value)}" for name, value in [("settings", settings), *parts.items()]
    )


def settings_digest(settings: Json) -> str:
    """Settings as they enter many unit keys: hashed once."""
    return _short(settings)


def changed_parts(before: str, after: str) -> list[str]:
    """Which parts of two unit keys differ, in the order of the newer one."""
    old = dict(part.split(":", 1) for part in before.split())
    return [
        name
        for name, _, value in (part.partition(":") for part in after.split())
        if old.get(name) != value
    ]


def _short(value: Json) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()[:NUM_KEY_DIGITS]


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
