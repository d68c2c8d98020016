"""Two stages of a user's own: how bright every picture is, and which are the darkest.

A stage is a frozen dataclass with a `config`. `plan` lists units and does no work, `run` does one
of them: it writes files into `workspace.scratch` and names them in its outcome. What is heavy is
imported inside `run`, so that `ediffi plan` stays quick.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from pipelines.stage import Manifest, Outcome, Unit, Workspace
from pipelines.store.fingerprint import unit_key


@dataclass(frozen=True, kw_only=True)
class BrightnessConfig:
    """What the recipe's `config` may say; anything else is refused."""

    scale: str = "fraction"

    def __post_init__(self) -> None:
        """Refuse what `run` could not do."""
        if self.scale not in ("fraction", "percent"):
            raise ValueError(f"scale must be 'fraction' or 'percent', got {self.scale!r}")


@dataclass(frozen=True, kw_only=True)
class Brightness:
    """One unit a shard, with a key: a shard that did not change is not looked at again."""

    config: BrightnessConfig
    version: ClassVar[int] = 1

    def plan(self, inputs: Mapping[str, Manifest]) -> Iterator[Unit]:
        """List the shards that hold pictures."""
        for receipt in inputs["ingest"].receipts:
            if receipt.num_out:
                (tar,) = (file for file in receipt.files if file.path.endswith(".tar"))
                key = unit_key([self.version, self.config.scale], pictures=tar.sha256)
                yield Unit(id=receipt.unit, arguments={"tar": tar.path}, key=key)

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        """Measure the pictures of one shard."""
        from brightness_of import read_brightness

        ingest = workspace.inputs["ingest"]
        (tar,) = (f for f in ingest.receipt(unit.id).files if f.path == unit.arguments["tar"])
        found = read_brightness(ingest.local_path(tar), percent=self.config.scale == "percent")
        name = f"{unit.id}.json"
        (workspace.scratch / name).write_text(json.dumps(found, sort_keys=True))
        return Outcome(files=[name], num_in=len(found), num_out=len(found))


@dataclass(frozen=True, kw_only=True)
class Darkest:
    """One unit. A config may be a plain mapping too."""

    config: Mapping[str, int]
    version: ClassVar[int] = 1

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        """List the one thing there is to do."""
        return [Unit(id="darkest")]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        """Read what the stage before published, and write the darkest pictures' keys."""
        measured = workspace.inputs["brightness"]
        found: dict[str, float] = {}
        for receipt in measured.receipts:
            found |= json.loads(measured.local_path(receipt.files[0]).read_text())
        darkest = heapq.nsmallest(self.config["num_pictures"], found, key=lambda key: found[key])
        (workspace.scratch / "darkest.json").write_text(json.dumps(darkest))
        metrics = {"mean_brightness": sum(found.values()) / len(found)}
        return Outcome(
            files=["darkest.json"],
            num_in=len(found),
            num_out=len(darkest),
            facts={"metrics": metrics, "artifacts": ["darkest.json"]},  # MLflow shows both
        )
