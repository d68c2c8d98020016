"""Put the experts together: one directory that can be copied away and still draws pictures.

With super-resolution models it holds the cascade: an ensemble for each of them, and in what order
they enlarge.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from ediffi.noise import SigmaDistribution
from pipelines.recipe import Recipe
from pipelines.recipe_sections.super_resolution import by_size
from pipelines.stage import Json, Manifest, Outcome, Unit, Workspace
from pipelines.stages.inputs import CLIP_FOLDER, encoder_config, snapshot_paths
from pipelines.stages.train_super_resolution import STAGE_PREFIX as MODEL_PREFIX
from pipelines.stages.train_super_resolution_experts import STAGE_PREFIX as EXPERTS_PREFIX
from pipelines.stages.untrained_experts import FACT, leave_out, make_stand_ins, untrained

ENSEMBLE_FOLDER = "ensemble"
ENCODERS_FOLDER = "encoders"
_ONLY_EXPERT = "whole"  # of a super-resolution model without experts: it serves all noise


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
        return ("base", "experts", *fitted, *self.embeds, *self._super_resolution_stages)

    def identity(self) -> Json:
        return {}  # all that matters reaches this stage through its inputs

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        return [Unit(id=ENSEMBLE_FOLDER)]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        from ediffi.ensemble_file import save_ensemble

        directory = workspace.scratch / ENSEMBLE_FOLDER
        base = snapshot_paths(workspace.inputs["base"])["base"]
        experts = snapshot_paths(workspace.inputs["experts"])
        lacking = untrained(workspace.inputs["experts"], self.recipe.experts, self._noise)
        save_ensemble(
            directory,
            {**experts, **make_stand_ins(workspace.scratch / "stand-ins", base, lacking)},
            base=base,
            encoders=self._encoders(workspace, directory),
        )
        num_experts, untrained_names = self._add_cascade(workspace, directory)
        leave_out(directory, lacking)
        untrained_names = [*lacking, *untrained_names]
        if untrained_names:
            workspace.notice(f"the base stands in for {', '.join(untrained_names)}")
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        # records go last here too, the ensemble's own at the very end: without it there is none
        files.sort(key=lambda path: (path.suffix == ".json", path == directory / "ensemble.json"))
        return Outcome(
            files=[str(path.relative_to(workspace.scratch)) for path in files],
            num_in=len(experts) + num_experts,
            num_out=1,
            facts={FACT: untrained_names} if untrained_names else {},
        )

    @property
    def _noise(self) -> SigmaDistribution:
        return self.recipe.noise.distribution

    @property
    def _super_resolution_stages(self) -> tuple[str, ...]:
        models = self.recipe.super_resolution.items()
        return (
            *(MODEL_PREFIX + name for name, _ in models),
            *(EXPERTS_PREFIX + name for name, model in models if model.experts is not None),
        )

    def _add_cascade(self, workspace: Workspace, directory: Path) -> tuple[int, list[str]]:
        """Put the super-resolution models in.

        Returns:
            Of how many experts they are, and the names of those that something stands in for.
        """
        from ediffi.cascade import FOLDER, save_cascade
        from ediffi.ensemble_file import save_ensemble

        if not self.recipe.super_resolution:
            return 0, []
        num_experts, ensembles, absent = 0, {}, {}
        for name, model in by_size(self.recipe.super_resolution).items():
            parent = snapshot_paths(workspace.inputs[MODEL_PREFIX + name])[name]
            experts, base, lacking = {_ONLY_EXPERT: parent}, None, {}
            if model.experts is not None:
                trained = workspace.inputs[EXPERTS_PREFIX + name]
                experts, base = snapshot_paths(trained), parent
                lacking = untrained(trained, model.experts, self._noise)
            num_experts += len(experts)
            experts |= make_stand_ins(workspace.scratch / "stand-ins" / name, parent, lacking)
            ensembles[name], absent[name] = directory / FOLDER / name, lacking
            # the base's ensemble says what encoders its streams come from, once for all
            save_ensemble(ensembles[name], experts, base=base, encoders={})
        save_cascade(directory, ensembles)
        for name, lacking in absent.items():
            leave_out(ensembles[name], lacking)
        return num_experts, [f"{name}/{one}" for name, lacking in absent.items() for one in lacking]

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
