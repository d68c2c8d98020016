"""Put the experts together: one directory that can be copied away and still draws pictures."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from pipelines.recipe import Recipe
from pipelines.stage import Json, Manifest, Outcome, Unit, Workspace
from pipelines.stages.inputs import CLIP_FOLDER, encoder_config, snapshot_paths

ENSEMBLE_FOLDER = "ensemble"
ENCODERS_FOLDER = "encoders"


@dataclass(frozen=True, kw_only=True)
class Assemble:
    """One unit: the ensemble directory. Refuses intervals that overlap or leave a gap."""

    recipe: Recipe
    embeds: tuple[str, ...]
    name: ClassVar[str] = "assemble"
    version: ClassVar[int] = 1
    gang: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[str, ...]:
        fitted = ("clip_fit",) if self.recipe.clip_fit is not None else ()
        return ("base", "experts", *fitted, *self.embeds)

    def identity(self) -> Json:
        return {}  # all that matters reaches this stage through its inputs

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        return [Unit(id=ENSEMBLE_FOLDER)]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        from ediffi.ensemble import save_ensemble

        directory = workspace.scratch / ENSEMBLE_FOLDER
        experts = snapshot_paths(workspace.inputs["experts"])
        save_ensemble(
            directory,
            experts,
            base=snapshot_paths(workspace.inputs["base"])["base"],
            encoders=self._encoders(workspace, directory),
        )
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        # the record goes last here too: an ensemble without it is no ensemble
        files.sort(key=lambda path: path.name == "ensemble.json")
        return Outcome(
            files=[str(path.relative_to(workspace.scratch)) for path in files],
            num_in=len(experts),
            num_out=1,
        )

    def _encoders(self, workspace: Workspace, directory: Path) -> dict[str, Json]:
        """Descriptions of the encoders; fitted weights are copied into the ensemble."""
        descriptions = {}
        for name, encoder in self.recipe.encoders.items():
            description = asdict(encoder_config(encoder, workspace.inputs))
            if encoder.is_fitted:
                inside = f"{ENCODERS_FOLDER}/{CLIP_FOLDER}"
                source = workspace.inputs["clip_fit"].local_folder(CLIP_FOLDER)
                shutil.copytree(source, directory / inside, dirs_exist_ok=True)
                description["weights"] = f"./{inside}"
            descriptions[name] = description
        return descriptions


def ensemble_path(assemble: Manifest) -> Path:
    """The ensemble directory that a finished `assemble` stage made."""
    return assemble.local_folder(ENSEMBLE_FOLDER)
