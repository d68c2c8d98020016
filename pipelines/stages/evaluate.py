"""Measure base and ensemble on what training never saw.

Loss by noise level, distances of the drawn pictures from real ones and whether they show what their
captions say; and what else the recipe's `evaluate` has a section for. Each measurement is a unit of
its own, so they are made side by side, and one that is added leaves the others as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from pipelines.recipe import Recipe
from pipelines.recipe_sections.evaluation import ClipFeatures
from pipelines.recipe_sections.sampling import SamplerSettings
from pipelines.stage import Json, Manifest, Outcome, Unit, Workspace
from pipelines.stages.evaluation.attention import measure_attention
from pipelines.stages.evaluation.drawings import measure_pictures
from pipelines.stages.evaluation.guidance_curve import measure_guidance_curve
from pipelines.stages.evaluation.losses import measure_losses
from pipelines.stages.evaluation.material import Material, Measured
from pipelines.stages.evaluation.painting import measure_painting
from pipelines.stages.evaluation.style import measure_style
from pipelines.stages.evaluation.text_ablation import measure_text_ablation
from pipelines.stages.inputs import without
from pipelines.store.fingerprint import unit_key

# Of every unit: what makes it, and which of the stage's inputs it reads beside the encoders.
MEASUREMENTS: dict[str, tuple[Callable[[Material], Measured], tuple[str, ...]]] = {
    "losses": (measure_losses, ("assemble", "ingest")),
    "pictures": (measure_pictures, ("sample", "ingest")),
    "guidance_curve": (measure_guidance_curve, ("assemble", "ingest")),
    "text_ablation": (measure_text_ablation, ("assemble", "ingest")),
    "attention": (measure_attention, ("assemble", "ingest")),
    "painting": (measure_painting, ("assemble",)),
    "style": (measure_style, ("assemble", "ingest")),
}
ALWAYS = ("losses", "pictures")
DRAWING = ("guidance_curve", "text_ablation", "painting", "style")  # with the recipe's sampler
ENCODERS = ("clip_fit", "embed")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Units: one a measurement, named after its section of the report."""

    recipe: Recipe
    embeds: tuple[str, ...]
    name: ClassVar[str] = "evaluate"
    version: ClassVar[int] = 3  # 3: measurements are units; intervals
    gang: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[str, ...]:
        fitted = ("clip_fit",) if self.recipe.clip_fit is not None else ()
        return ("assemble", "sample", "ingest", *fitted, *self.embeds)

    def identity(self) -> Json:
        config = self.recipe.evaluate
        return {
            **config.model_dump(mode="json"),
            "seed": self.recipe.seed,
            **self._features_identity(),
        }

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        return [Unit(id=name, key=self._key(name, inputs)) for name in self._measurements()]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        measure, _ = MEASUREMENTS[unit.id]
        measured = measure(Material(self.recipe, workspace))
        name = f"{unit.id}.json"
        text = json.dumps(measured.document, indent=1, sort_keys=True, allow_nan=False)
        (workspace.scratch / name).write_text(text + "\n")
        return Outcome(
            files=[name, *measured.pictures],
            num_in=measured.num_in,
            num_out=measured.num_out,
            facts={"artifacts": [name, *measured.pictures]},
        )

    def _measurements(self) -> list[str]:
        config = self.recipe.evaluate
        return [name for name in MEASUREMENTS if name in ALWAYS or getattr(config, name)]

    def _key(self, name: str, inputs: Mapping[str, Manifest]) -> str:
        """A measurement is taken over as long as what it reads and its own settings stay."""
        _, reads = MEASUREMENTS[name]
        contents = {
            stage: manifest.contents
            for stage, manifest in inputs.items()
            if stage.split("/")[0] in (*reads, *ENCODERS)
        }
        return unit_key(self._settings(name), **contents)

    def _settings(self, name: str) -> Json:
        recipe = self.recipe
        config = recipe.evaluate.model_dump(mode="json")
        sampler = recipe.sample.model_dump(mode="json", include=set(SamplerSettings.model_fields))
        return {
            "version": self.version,
            "seed": recipe.seed,
            "image_px": recipe.base_px,
            "resize": recipe.data.resize,
            "missing_embeddings": recipe.missing_embeddings,
            "sampler": sampler if name in DRAWING else {},
            "evaluate": without(config, set(MEASUREMENTS) - {name}),
            **self._features_identity(),
        }

    def _features_identity(self) -> Json:
        features = self.recipe.evaluate.features
        if isinstance(features, ClipFeatures):
            return {}  # an encoder of the recipe, known by the stage that embeds with it
        from ediffi.features import extractor_identity

        return {"features_identity": extractor_identity(features.model_dump())}
