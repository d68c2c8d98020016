"""Draw pictures with the base and with the ensemble, from equal noise.

The recipe's prompts become a grid to look at; held-out captions become the set that is measured.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipelines.recipe import Sampling
from pipelines.stage import Json, Manifest, Outcome, Unit, Workspace
from pipelines.stages.assemble import ensemble_path
from pipelines.stages.inputs import image_shards, shard_file

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ediffi.generator import Generator, Model, SamplingConfig

PROMPTS_UNIT = "prompts"
MODELS: tuple[Model, ...] = ("base", "ensemble")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Units: the prompts' grid, and the held-out captions in batches."""

    config: Sampling
    seed: int
    name: ClassVar[str] = "sample"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("assemble", "ingest")
    gang: ClassVar[bool] = False

    def identity(self) -> Json:
        return {**self.config.model_dump(mode="json"), "seed": self.seed}

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        captions = held_out_captions(inputs["ingest"], self.config.num_held_out_captions)
        size = self.config.batch_pictures
        jobs = [
            {"caption": caption, "seed": self.seed + index}
            for caption in captions
            for index in range(self.config.pictures_per_caption)
        ]
        batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
        return [
            Unit(id=PROMPTS_UNIT),
            *(
                Unit(id=f"held-out-{index:04d}", arguments={"jobs": batch})
                for index, batch in enumerate(batches)
            ),
        ]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        import ediffi

        generator = ediffi.load(
            ensemble_path(workspace.inputs["assemble"]), device=workspace.device
        )
        if unit.id == PROMPTS_UNIT:
            return self._draw_prompts(generator, workspace)
        return self._draw_held_out(generator, unit, workspace)

    def _draw_prompts(self, generator: Generator, workspace: Workspace) -> Outcome:
        from pipelines.grids import draw_grid

        prompts, seeds = self.config.prompts, self.config.seeds
        pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
        pictures: dict[str, Tensor] = {
            model: self._generate(generator, model, pairs).unflatten(0, (len(prompts), len(seeds)))
            for model in MODELS
        }
        names = ["grid.png"]
        draw_grid(prompts, pictures).save(workspace.scratch / "grid.png")
        for model, model_pictures in pictures.items():
            name = f"prompts-{model}.tar"
            jobs = [{"caption": prompt, "seed": seed} for prompt, seed in pairs]
            _write_pictures(workspace.scratch / name, "prompt", jobs, model_pictures.flatten(0, 1))
            names.append(name)
        num = len(pairs) * len(MODELS)
        return Outcome(files=names, num_in=num, num_out=num, facts={"artifacts": ["grid.png"]})

    def _draw_held_out(self, generator: Generator, unit: Unit, workspace: Workspace) -> Outcome:
        jobs = unit.arguments["jobs"]
        pairs = [(job["caption"], job["seed"]) for job in jobs]
        names = []
        for model in MODELS:
            names.append(f"{unit.id}-{model}.tar")
            pictures = self._generate(generator, model, pairs)
            _write_pictures(workspace.scratch / names[-1], unit.id, jobs, pictures)
        num = len(pairs) * len(MODELS)
        return Outcome(files=names, num_in=num, num_out=num)

    def _generate(
        self, generator: Generator, model: Model, pairs: Sequence[tuple[str, int]]
    ) -> Tensor:
        prompts, seeds = zip(*pairs, strict=True)
        return generator.generate(prompts, seeds=seeds, config=self._sampling(), model=model)

    def _sampling(self) -> SamplingConfig:
        from ediffi.generator import SamplingConfig

        names = SamplingConfig.__dataclass_fields__
        return SamplingConfig(**{name: getattr(self.config, name) for name in names})


def held_out_captions(ingest: Manifest, num_captions: int) -> list[str]:
    """The first distinct captions of the held-out split, in order."""
    from ediffi.shards import caption_of, read_shard

    captions: dict[str, None] = {}
    for receipt in image_shards(ingest, "held_out"):
        for _, members in read_shard(ingest.local_path(shard_file(receipt))):
            captions.setdefault(caption_of(members))
            if len(captions) == num_captions:
                return list(captions)
    return list(captions)


def _write_pictures(path: Path, prefix: str, jobs: Sequence[Json], pictures: Tensor) -> None:
    from PIL import Image

    from ediffi.shards import ShardWriter

    with ShardWriter(path) as writer:
        for index, (job, picture) in enumerate(zip(jobs, pictures, strict=True)):
            stream = io.BytesIO()
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(stream, "PNG")
            members = {
                "json": json.dumps(job, sort_keys=True).encode(),
                "png": stream.getvalue(),
                "txt": job["caption"].encode(),
            }
            writer.write(f"{prefix}-{index:05d}", members)
