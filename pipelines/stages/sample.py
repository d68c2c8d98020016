"""Draw pictures with the base and with the ensemble, from equal noise.

The recipe's prompts become a grid to look at; held-out captions become the set that is measured.
Where the recipe asks for it, more grids show a cascade, styles taken from pictures, and paintings.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pipelines.errors import UserError
from pipelines.recipe_sections.sampling import Sampling
from pipelines.stage import Json, Manifest, Outcome, Receipt, Unit, Workspace
from pipelines.stages.assemble import ENSEMBLE_FOLDER, ensemble_path
from pipelines.stages.inputs import image_shards, shard_file
from pipelines.stages.untrained_experts import missing_experts
from pipelines.store.fingerprint import file_sha256

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ediffi.generator import Generator, Model
    from ediffi.painting import Painting

PROMPTS_UNIT, CASCADE_UNIT, STYLES_UNIT, PAINTINGS_UNIT = (
    "prompts",
    "cascade",
    "styles",
    "paintings",
)
GRIDS = {
    PROMPTS_UNIT: "grid.png",
    CASCADE_UNIT: "cascade.png",
    STYLES_UNIT: "styles.png",
    PAINTINGS_UNIT: "paintings.png",
}
MODELS: tuple[Model, ...] = ("base", "ensemble")
_HELD_OUT = "held-out-"
_CASCADE_RECORD = f"{ENSEMBLE_FOLDER}/cascade.json"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Units: the grids, and the held-out captions in batches."""

    config: Sampling
    seed: int
    name: ClassVar[str] = "sample"
    version: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("assemble", "ingest")
    gang: ClassVar[bool] = False

    def identity(self) -> Json:
        """Pictures that the recipe names count with their bytes.

        Raises:
            UserError: one is not there.
        """
        files = {str(path): file_sha256(path) for path in self._named_files()}
        return {**self.config.model_dump(mode="json"), "seed": self.seed, "files": files}

    def _named_files(self) -> Iterator[Path]:
        """Every file that is a reference, a painting or part of one."""
        named = {
            **{f"styles.{i}.reference": s.reference for i, s in enumerate(self.config.styles)},
            **{f"paintings.{i}.painting": p.painting for i, p in enumerate(self.config.paintings)},
        }
        for field, name in named.items():
            path = Path(name)
            if not path.exists():
                raise UserError(f"sample.{field}: nothing at {path}: name a picture that is there")
            yield from (
                sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            )

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        captions = held_out_captions(inputs["ingest"], self.config.num_held_out_captions)
        size = self.config.batch_pictures
        jobs = [
            {"caption": caption, "seed": self.seed + index}
            for caption in captions
            for index in range(self.config.pictures_per_caption)
        ]
        batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
        grids = {
            PROMPTS_UNIT: True,
            CASCADE_UNIT: _has_cascade(inputs["assemble"]),
            STYLES_UNIT: bool(self.config.styles),
            PAINTINGS_UNIT: bool(self.config.paintings),
        }
        return [
            *(Unit(id=name) for name, is_wanted in grids.items() if is_wanted),
            *(
                Unit(id=f"{_HELD_OUT}{index:04d}", arguments={"jobs": batch})
                for index, batch in enumerate(batches)
            ),
        ]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        import ediffi

        generator = ediffi.load(
            ensemble_path(workspace.inputs["assemble"]),
            device=workspace.device,
            missing_experts=missing_experts(workspace.inputs["assemble"]),
        )
        grids = {
            PROMPTS_UNIT: self._draw_prompts,
            CASCADE_UNIT: self._draw_cascade,
            STYLES_UNIT: self._draw_styles,
            PAINTINGS_UNIT: self._draw_paintings,
        }
        if unit.id in grids:
            return grids[unit.id](generator, workspace.scratch)
        return self._draw_held_out(generator, unit, workspace.scratch)

    def _draw_prompts(self, generator: Generator, scratch: Path) -> Outcome:
        """Base and ensemble side by side."""
        drawn: dict[str, Tensor] = {
            model: self._draw(generator, self._jobs(), model) for model in MODELS
        }
        return self._grid(self.config.prompts, self._blocks(drawn), drawn, PROMPTS_UNIT, scratch)

    def _draw_cascade(self, generator: Generator, scratch: Path) -> Outcome:
        """Each size of the cascade; the grid shows the first seed, the tars all of them."""
        jobs = self._jobs()
        sizes = generator.draw_sizes(
            [job["caption"] for job in jobs],
            seeds=[job["seed"] for job in jobs],
            config=self.config.config(),
            enlarging=self.config.enlarging.config(),
            image_px=self.config.image_px or max(generator.sizes_px),
        )
        drawn = {f"{px}px": pictures for px, pictures in sizes.items()}
        shown = {name: block[:, :1] for name, block in self._blocks(drawn).items()}
        return self._grid(self.config.prompts, shown, drawn, CASCADE_UNIT, scratch)

    def _draw_styles(self, generator: Generator, scratch: Path) -> Outcome:
        """Each prompt without and with its reference, beside the reference."""
        from ediffi.pictures import decode_image

        examples = self.config.styles
        prompts = [one.prompt for one in examples]
        jobs = self._jobs(prompts)
        references = [decode_image(Path(one.reference).read_bytes()) for one in examples]
        styles = [one for one in references for _ in self.config.seeds]
        drawn = {
            "plain": self._draw(generator, jobs),
            "styled": self._draw(generator, jobs, style=styles),
        }
        shown = {"reference": _tiles(references, generator), **self._blocks(drawn)}
        return self._grid(prompts, shown, drawn, STYLES_UNIT, scratch)

    def _draw_paintings(self, generator: Generator, scratch: Path) -> Outcome:
        """Each prompt without and with its painting, beside the painting."""
        from pipelines.paintings import read_painting, show_painting

        examples = self.config.paintings
        prompts = [one.prompt for one in examples]
        jobs = self._jobs(prompts)
        paths = [Path(one.painting) for one in examples]
        paintings = [
            read_painting(path, one.phrases, one.strengths)
            for path, one in zip(paths, examples, strict=True)
        ]
        drawn = {
            "plain": self._draw(generator, jobs),
            "painted": self._draw(
                generator, jobs, painting=[one for one in paintings for _ in self.config.seeds]
            ),
        }
        pictures = [show_painting(*both) for both in zip(paths, paintings, strict=True)]
        shown = {"painting": _tiles(pictures, generator), **self._blocks(drawn)}
        return self._grid(prompts, shown, drawn, PAINTINGS_UNIT, scratch)

    def _draw_held_out(self, generator: Generator, unit: Unit, scratch: Path) -> Outcome:
        jobs, names = unit.arguments["jobs"], []
        for model in MODELS:
            names.append(f"{unit.id}-{model}.tar")
            pictures = self._draw(generator, jobs, model)
            _write_pictures(scratch / names[-1], unit.id, jobs, pictures)
        num = len(jobs) * len(MODELS)
        return Outcome(files=names, num_in=num, num_out=num)

    def _jobs(self, prompts: Sequence[str] = ()) -> list[Json]:
        """Each prompt with each of the recipe's seeds."""
        return [
            {"caption": prompt, "seed": seed}
            for prompt in prompts or self.config.prompts
            for seed in self.config.seeds
        ]

    def _draw(
        self,
        generator: Generator,
        jobs: Sequence[Json],
        model: Model = "ensemble",
        *,
        style: Sequence[Image] | None = None,
        painting: Sequence[Painting] | None = None,
    ) -> Tensor:
        """Pictures at the base's size."""
        return generator.draw(
            [job["caption"] for job in jobs],
            seeds=[job["seed"] for job in jobs],
            config=self.config.config(),
            model=model,
            style=style,
            painting=painting,
            image_px=min(generator.sizes_px),
        )

    def _blocks(self, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Blocks of a grid: a row a prompt, a column a seed."""
        shape = (-1, len(self.config.seeds))
        return {name: pictures.unflatten(0, shape) for name, pictures in drawn.items()}

    def _grid(
        self,
        prompts: Sequence[str],
        shown: Mapping[str, Tensor],
        drawn: Mapping[str, Tensor],
        unit: str,
        scratch: Path,
    ) -> Outcome:
        """Write a grid of what is shown, and a tar of each set that was drawn."""
        from pipelines.grids import draw_grid

        grid = GRIDS[unit]
        draw_grid(prompts, shown).save(scratch / grid)
        names = [grid]
        for name, pictures in drawn.items():
            names.append(f"{unit}-{name}.tar")
            _write_pictures(scratch / names[-1], "prompt", self._jobs(prompts), pictures)
        num = sum(len(pictures) for pictures in drawn.values())
        return Outcome(files=names, num_in=num, num_out=num, facts={"artifacts": [grid]})


def held_out_receipts(sample: Manifest) -> Iterator[Receipt]:
    """Receipts of the units that drew for held-out captions, which are measured; grids are not."""
    return (receipt for receipt in sample.receipts if receipt.unit.startswith(_HELD_OUT))


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


def _has_cascade(assemble: Manifest) -> bool:
    return any(file.path == _CASCADE_RECORD for one in assemble.receipts for file in one.files)


def _tiles(pictures: Sequence[Image], generator: Generator) -> Tensor:
    """Pictures of any size as a block of a grid, one a row: uint8 (B, 1, 3, H, W)."""
    import torch

    from ediffi.pictures import fit_image
    from pipelines.grids import tile_px

    side = tile_px(min(generator.sizes_px))
    fitted = [torch.from_numpy(fit_image(one, side, "pad")) for one in pictures]
    return torch.stack(fitted).permute(0, 3, 1, 2)[:, None]


def _write_pictures(path: Path, prefix: str, jobs: Sequence[Json], pictures: Tensor) -> None:
    from ediffi.pictures import to_pil
    from ediffi.shards import ShardWriter

    with ShardWriter(path) as writer:
        for index, (job, picture) in enumerate(zip(jobs, to_pil(pictures), strict=True)):
            stream = io.BytesIO()
            picture.save(stream, "PNG")
            members = {
                "json": json.dumps(job, sort_keys=True).encode(),
                "png": stream.getvalue(),
                "txt": job["caption"].encode(),
            }
            writer.write(f"{prefix}-{index:05d}", members)
