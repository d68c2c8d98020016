"""What a stage is: a `plan` that lists units of work and an idempotent `run(unit)`.

A stage knows nothing of Ray, retries, skipping or MLflow; the runner knows nothing of pictures.
Between them travel four records: `Unit` (what to do), `Outcome` (what a stage says it did),
`Receipt` (the published proof of it) and `Manifest` (all receipts of a finished stage).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

Json = Any  # what json.loads gives back


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The smallest thing worth redoing: one shard, one expert, one batch of prompts."""

    id: str
    arguments: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class File:
    """One published file. `path` is relative to the stage directory, absolute if adopted."""

    path: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What `Stage.run` reports; the files it names lie in the workspace's scratch directory."""

    files: Sequence[str] = ()
    adopted: Sequence[File] = ()
    num_in: int = 0
    num_out: int = 0
    rejects: Mapping[str, Sequence[str]] = field(default_factory=dict)
    facts: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """Proof that one unit is done: counts, rejects by reason, and the digest of every file."""

    unit: str
    files: tuple[File, ...]
    num_in: int
    num_out: int
    rejects: Mapping[str, Sequence[str]]
    facts: Mapping[str, Json]
    seconds: float
    attempt: int
    host: str

    def to_json(self) -> Json:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Json) -> Receipt:
        return cls(**{**data, "files": tuple(File(**file) for file in data["files"])})


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A finished stage. The file exists if and only if every unit has its receipt."""

    stage: str
    fingerprint: str
    directory: Path
    identity: Json
    inputs: Mapping[str, str]
    receipts: tuple[Receipt, ...]
    run_id: str
    created: str

    def path(self, file: File) -> Path:
        """Where a file of this stage lies (adopted files keep their own absolute path)."""
        return self.directory / file.path

    def receipt(self, unit: str) -> Receipt:
        return next(receipt for receipt in self.receipts if receipt.unit == unit)

    @property
    def seconds(self) -> float:
        return sum(receipt.seconds for receipt in self.receipts)

    @property
    def num_rejects(self) -> Counter[str]:
        """How many samples were rejected, by reason, over all units."""
        counts: Counter[str] = Counter()
        for receipt in self.receipts:
            counts.update({reason: len(keys) for reason, keys in receipt.rejects.items()})
        return counts

    def to_json(self) -> Json:
        document = {key: value for key, value in vars(self).items() if key != "directory"}
        return {
            "format": 1,
            **document,
            "inputs": dict(self.inputs),
            "receipts": [receipt.to_json() for receipt in self.receipts],
        }

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read `directory/manifest.json`. Raises FileNotFoundError if the stage is unfinished."""
        data = json.loads((directory / "manifest.json").read_text())
        data.pop("format")
        receipts = tuple(Receipt.from_json(receipt) for receipt in data.pop("receipts"))
        return cls(directory=directory, receipts=receipts, **data)


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Where one attempt at a unit works, and what it may see."""

    scratch: Path  # fresh; files named in the outcome are published from here, the rest vanishes
    durable: Path  # survives attempts and drivers: checkpoints, progress
    inputs: Mapping[str, Manifest]
    attempt: int = 1
    device: str = "cpu"  # "cuda" where the recipe gives the stage GPUs
    rank: int = 0
    world_size: int = 1
    report: Callable[[Mapping[str, float]], None] = lambda row: None


class Stage(Protocol):
    """One step of the pipeline. Implementations are frozen dataclasses, one file each."""

    @property
    def name(self) -> str:
        """Name of the stage, also its folder in the store, such as `embed/t5`."""

    @property
    def version(self) -> int:
        """Bumped when equal inputs would give different bytes."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the stages whose manifests this one reads."""

    @property
    def gang(self) -> bool:
        """Whether a unit can be done by several workers together under torch.distributed."""

    def identity(self) -> Json:
        """Every configured value that can change bytes; hashed into the fingerprint."""

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        """List the work; do none of it."""

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        """Do one unit. Safe to run again after a crash; same bytes every time."""
