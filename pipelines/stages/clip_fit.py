"""Fit a small CLIP on the recipe's own pictures, where no pretrained one is at hand or fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipelines.recipe import ClipFit
from pipelines.stage import Json, Manifest, Outcome, Unit, Workspace
from pipelines.stages.inputs import CLIP_FOLDER, image_shards, shard_file

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class FitClip:
    """Train an open_clip model contrastively on the training split. One unit."""

    config: ClipFit
    seed: int
    name: ClassVar[str] = "clip_fit"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("ingest",)
    gang: ClassVar[bool] = False

    def identity(self) -> Json:
        return {**self.config.model_dump(mode="json"), "seed": self.seed}

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        return [Unit(id=CLIP_FOLDER)]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        from ediffi.clip_fit import ClipFitConfig, fit_clip

        samples = list(_captioned_pictures(workspace.inputs["ingest"]))
        config = ClipFitConfig(**self.config.model_dump(), seed=self.seed)
        directory = workspace.scratch / CLIP_FOLDER
        metrics = fit_clip(samples, config, directory, workspace.report)
        return Outcome(
            files=[f"{CLIP_FOLDER}/{path.name}" for path in sorted(directory.iterdir())],
            num_in=len(samples),
            num_out=len(samples),
            facts={"metrics": metrics},
        )


def _captioned_pictures(ingest: Manifest) -> Iterator[tuple[Image, str]]:
    from ediffi.shards import caption_of, decode_image, picture_of, read_shard

    for receipt in image_shards(ingest, "train"):
        for _, members in read_shard(ingest.local_path(shard_file(receipt))):
            yield decode_image(picture_of(members)), caption_of(members)
