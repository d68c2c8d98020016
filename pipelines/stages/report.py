"""What a run found, in one place: `report.json` for programs, `report.html` for people.

The page holds its pictures and needs nothing beside it, so it can be sent to somebody.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from pipelines.stage import Json, Manifest, Outcome, Receipt, Unit, Workspace
from pipelines.stages.evaluation.chapters import chapters, grids_chapter
from pipelines.stages.evaluation.figures import figures
from pipelines.stages.evaluation.page import render

REPORT_UNIT = "report"


@dataclass(frozen=True, kw_only=True)
class Report:
    """One unit: the report."""

    name: ClassVar[str] = "report"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("evaluate", "sample")
    gang: ClassVar[bool] = False

    def identity(self) -> Json:
        return {}  # all that matters reaches this stage through its inputs

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        return [Unit(id=REPORT_UNIT)]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        evaluate, sample = workspace.inputs["evaluate"], workspace.inputs["sample"]
        report: dict[str, Json] = {}
        for _, file in _artifacts(evaluate, ".json"):
            report |= json.loads(file)
        measured, drawn = dict(_artifacts(evaluate, ".png")), dict(_artifacts(sample, ".png"))
        page = render(
            "Evaluation",
            f"evaluate/{evaluate.fingerprint}, sample/{sample.fingerprint}",
            [grids_chapter(drawn), *chapters(report, measured)],
        )
        text = json.dumps(report, indent=1, sort_keys=True, allow_nan=False)
        (workspace.scratch / "report.json").write_text(text + "\n")
        (workspace.scratch / "report.html").write_text(page, encoding="utf-8")
        names = ["report.json", "report.html"]
        return Outcome(
            files=names,
            num_in=report["num_real"],
            num_out=report["num_drawn"],
            facts={"metrics": figures(report), "artifacts": names},
        )


def _artifacts(manifest: Manifest, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of what units keep for people, in order."""
    for receipt in manifest.receipts:
        for name in _names(receipt, suffix):
            file = next(file for file in receipt.files if file.path == name)
            yield name, manifest.local_path(file).read_bytes()


def _names(receipt: Receipt, suffix: str) -> list[str]:
    return [name for name in receipt.facts.get("artifacts", ()) if name.endswith(suffix)]
