"""What tests of ingest feed it with, and how they run one unit of it."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ediffi.shards import ShardWriter, read_shard
from pipelines.recipe import HeldOut, PictureFolder
from pipelines.stage import File, Outcome, Receipt, Unit, Workspace
from pipelines.stages.ingest import IngestFolder

NOBODY = HeldOut(fraction=0.0)


def picture(seed: int, size: tuple[int, int] = (24, 16), kind: str = "png") -> bytes:
    """An encoded picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=kind)
    return stream.getvalue()


def write_pictures(folder: Path, num: int) -> None:
    folder.mkdir(exist_ok=True)
    for index in range(num):
        (folder / f"{index}.png").write_bytes(picture(index))


def write_list(path: Path, rows: Mapping[str, Sequence[Any]]) -> str:
    """Write a parquet list; its path as a recipe has it."""
    pq.write_table(pa.table(rows), path)
    return str(path)


def write_tar(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> Path:
    """Write a sound tar of samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ShardWriter(path) as writer:
        for key, members in samples.items():
            writer.write(key, members)
    return path


def folder_stage(tmp_path: Path, rows: Mapping[str, Sequence[Any]], **config: Any) -> IngestFolder:
    """The stage over `tmp_path/pictures` and a list of these rows."""
    (tmp_path / "pictures").mkdir(exist_ok=True)
    defaults = {"held_out": NOBODY, "image_px": 8, "shard_images": 100}
    return IngestFolder(
        config=PictureFolder(
            source="folder",
            folder=str(tmp_path / "pictures"),
            list=write_list(tmp_path / "list.parquet", rows),
            **{**defaults, **config},
        ),
        seed=0,
    )


def plan(stage: Any) -> list[Unit]:
    return list(stage.plan({}))


def run(stage: Any, unit: Unit, scratch: Path, **workspace: Any) -> Outcome:
    """Run one unit; its files stay in `scratch`."""
    scratch.mkdir(parents=True)
    return stage.run(unit, Workspace(scratch=scratch, durable=scratch, inputs={}, **workspace))


def receipt(unit: Unit, outcome: Outcome, files: Sequence[File] = ()) -> Receipt:
    """The receipt that the runner would publish."""
    names = ("num_in", "num_out", "rejects", "flagged", "facts")
    counts = {name: getattr(outcome, name) for name in names}
    return Receipt(unit=unit.id, key=unit.key, files=tuple(files), **counts)


def tar_of(outcome: Outcome, scratch: Path) -> Path:
    return next(scratch / name for name in outcome.files if name.endswith(".tar"))


def samples(scratch: Path, outcome: Outcome) -> dict[str, dict[str, bytes]]:
    """What the unit's tar holds."""
    return dict(read_shard(tar_of(outcome, scratch)))
