"""Trying a recipe's caches on a few of its own samples, to predict what all of them will take.

The real stages run, in this process and in a store that is thrown away.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import UserError
from pipelines.planning import PlannedStage, contents_of, describe
from pipelines.prediction.cost import Rate
from pipelines.recipe import CacheRecipe, Encoder, ReadyShards, Resources
from pipelines.stage import Manifest, Receipt, Stage, Unit
from pipelines.stage_graph import build_stages
from pipelines.stages.inputs import CLIP_FOLDER, EMBED_PREFIX, image_shards, shard_file
from pipelines.store.fingerprint import fingerprint
from pipelines.store.ledger import Ledger
from pipelines.store.location import Location, location
from pipelines.worker.execute import Task, execute

if TYPE_CHECKING:
    from pipelines.recipe_sections.data import Data

INGEST = "ingest"


@dataclass(frozen=True, kw_only=True)
class Probed:
    """Rates by stage, and why some stages have none."""

    rates: Mapping[str, Rate]
    left_out: Mapping[str, str]


def probe(
    recipe: CacheRecipe,
    planned: Sequence[PlannedStage],
    manifests: Mapping[str, Manifest],
    num_samples: int,
) -> Probed:
    """Ingest and encode about `num_samples` samples with every encoder that has work to do.

    Args:
        planned: the recipe's stages.
        manifests: of those that are finished.

    Raises:
        UserError: the recipe's data cannot be read.
    """
    encoders, left_out = _encoders(recipe, planned, manifests)
    with tempfile.TemporaryDirectory(prefix="ediffi-probe-") as folder:
        data = _few_samples(recipe, planned[0].stage, manifests, num_samples, Path(folder))
        few = CacheRecipe.model_construct(
            name=recipe.name,
            seed=recipe.seed,
            data=data,
            clip_fit=None,
            encoders=encoders,
            resources=recipe.resources,
        )
        rates = _run(few, Path(folder))
    return Probed(rates=rates, left_out=left_out)


def _encoders(
    recipe: CacheRecipe, planned: Sequence[PlannedStage], manifests: Mapping[str, Manifest]
) -> tuple[dict[str, Encoder], dict[str, str]]:
    """Encoders that have work to do, fitted weights as a path; and by stage why one cannot yet."""
    missing = {one.name for one in planned if not one.is_hit}
    encoders, left_out = {}, {}
    for name, encoder in recipe.encoders.items():
        if EMBED_PREFIX + name not in missing or encoder.cache:
            continue
        if encoder.is_fitted and "clip_fit" not in manifests:
            left_out[EMBED_PREFIX + name] = "its CLIP is not fitted yet"
            continue
        if encoder.is_fitted:
            weights = str(manifests["clip_fit"].local_folder(CLIP_FOLDER))
            encoder = encoder.model_copy(update={"weights": weights})
        encoders[name] = encoder
    return encoders, left_out


def _few_samples(
    recipe: CacheRecipe,
    ingest: Stage,
    manifests: Mapping[str, Manifest],
    num_samples: int,
    folder: Path,
) -> Data:
    """A `data` section whose first unit holds the first samples of the recipe's own data."""
    data = recipe.data
    if INGEST in manifests:
        manifest = manifests[INGEST]
        first = next(iter(image_shards(manifest)), None)
        if first is None:
            raise UserError("--probe: ingest holds no samples")
        source = manifest.local_path(shard_file(first))
    elif isinstance(data, ReadyShards):
        unit = next(iter(ingest.plan({})))
        source = _local(location(unit.arguments["place"]), folder)
    else:
        return data.model_copy(update={"shard_images": num_samples})
    target = folder / "few.tar"
    _write_first(source, target, num_samples)
    if isinstance(data, ReadyShards):
        return data.model_copy(update={"train": str(target), "held_out": ""})
    return ReadyShards(source="shards", train=str(target), image_px=data.image_px)


def _local(place: Location, folder: Path) -> Path:
    if isinstance(place, Path):
        return place
    place.fs.get_file(place.path, str(folder / "first.tar"))
    return folder / "first.tar"


def _write_first(source: Path, target: Path, num_samples: int) -> None:
    """Copy the first whole samples of a tar, however damaged the rest is."""
    from ediffi.storage.shard_format import ShardWriter
    from ediffi.storage.tar_index import MappedTar, salvage

    samples = salvage(source).samples
    with closing(MappedTar(source)) as tar, ShardWriter(target) as writer:
        for key, members in islice(samples.items(), num_samples):
            writer.write(key, {name: tar.read(span) for name, span in members.items()})


def _run(recipe: CacheRecipe, folder: Path) -> dict[str, Rate]:
    """The first unit of ingest, and what each encoder makes of it."""
    ledger = Ledger.open(folder / "store")
    ingest, *embeds = build_stages(recipe)
    unit = next(iter(ingest.plan({})))
    [receipt], manifest = _do(ingest, {}, [unit], "cpu", ledger)
    if not receipt.num_out:
        rejects = ", ".join(f"{why}: {len(keys)}" for why, keys in receipt.rejects.items())
        raise UserError(f"--probe: none of the first {receipt.num_in} samples is fit ({rejects})")
    rates = {INGEST: _rate(receipt, f"probe of {receipt.num_in} samples")}
    for stage in embeds:
        device, where = _device(recipe.resources_of(stage.name))
        # the empty caption comes first: it loads the model, which a long run does but once
        units = stage.plan({INGEST: manifest})
        [*_, receipt], _ = _do(stage, {INGEST: manifest}, units, device, ledger)
        rates[stage.name] = _rate(receipt, f"probe of {receipt.num_in} samples on {where}")
    return rates


def _do(
    stage: Stage,
    inputs: Mapping[str, Manifest],
    units: Iterable[Unit],
    device: str,
    ledger: Ledger,
) -> tuple[list[Receipt], Manifest]:
    """Do units of a stage here and now, and finish it with them alone."""
    addresses = {name: manifest.fingerprint for name, manifest in inputs.items()}
    contents = contents_of(inputs, inputs)
    address = fingerprint(stage, addresses)
    record = ledger.stage(stage.name, address)
    record.open(describe(stage, addresses), contents)
    receipts = []
    for unit in units:
        task = Task(
            store=str(ledger.store),
            stage=stage,
            fingerprint=address,
            inputs=addresses,
            unit=unit,
            device=device,
        )
        receipt = execute(task)
        assert receipt is not None, "a single worker publishes"
        receipts.append(receipt)
    manifest = record.complete(
        stage.name,
        describe(stage, addresses),
        addresses,
        contents,
        [receipt.unit for receipt in receipts],
        "probe",
    )
    return receipts, manifest


def _device(resources: Resources) -> tuple[str, str]:
    """The device that stands for a worker's, and what to call it."""
    import torch

    if resources.gpus and torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_name()
    torch.set_num_threads(max(1, int(resources.cpus)))  # as many as Ray gives a worker
    if resources.gpus:
        return "cpu", "this machine's CPU, which has no GPU: at most what a GPU takes"
    return "cpu", "this machine's CPU"


def _rate(receipt: Receipt, source: str) -> Rate:
    return Rate(
        num_samples_per_unit=receipt.num_in,
        seconds=receipt.seconds / receipt.num_in,
        num_bytes=sum(file.num_bytes for file in receipt.files) / receipt.num_in,
        num_out_fraction=receipt.num_out / receipt.num_in,
        source=source,
    )
