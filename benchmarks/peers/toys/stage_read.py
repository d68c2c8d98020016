"""The first step of the stale-cache toy as a custom stage."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from reading import number_of  # type: ignore[import-not-found]
from toy import note  # type: ignore[import-not-found]  # beside the recipe too

from pipelines.stage import Manifest, Outcome, Unit, Workspace


@dataclass(frozen=True, kw_only=True)
class Read:
    """The number that stands for the training shards."""

    config: dict[str, Any]
    version: ClassVar[int] = 1

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        return [Unit(id="number")]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        note("read")
        ingest = workspace.inputs["ingest"]
        shards = [
            ingest.local_path(file)
            for receipt in ingest.receipts
            if receipt.facts["split"] == "train"
            for file in receipt.files
            if file.path.endswith(".tar")
        ]
        number = sum(number_of(str(path)) for path in shards)
        (workspace.scratch / "number.txt").write_text(str(number))
        return Outcome(files=["number.txt"])
