"""Tests of pipelines.stages.train_super_resolution: the job that a unit gives to the library."""

from pathlib import Path
from typing import Any

import pytest

from ediffi.conditioning import StreamConfig
from ediffi.degradation import LowRes
from ediffi.efficient_unet import EfficientUNetConfig
from pipelines.recipe_file import load_recipe
from pipelines.stage import Outcome
from pipelines.stages import train_super_resolution
from pipelines.stages.train_super_resolution import TrainSuperResolution

STREAMS = (StreamConfig(name="t5", token_width=8),)


class Workspace:
    """What `run` asks of a workspace."""

    def __init__(self, folder: Path) -> None:
        self.scratch, self.durable, self.inputs = folder / "scratch", folder / "durable", {}


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the stage asks of `train_job`; nothing is trained."""
    asked: dict[str, Any] = {}

    def note(recipe: object, workspace: object, **arguments: Any) -> dict[str, Any]:
        asked.update(arguments)
        return asked

    monkeypatch.setattr(train_super_resolution, "train_job", note)

    def train_unit(job: object, workspace: object, *, keeps_state: bool) -> Outcome:
        asked["keeps_state"] = keeps_state
        return Outcome()

    monkeypatch.setattr(train_super_resolution, "train_unit", train_unit)
    monkeypatch.setattr(train_super_resolution, "stream_configs", lambda *_: STREAMS)
    return asked


@pytest.mark.parametrize(("name", "picture_px"), [("sr256", 256), ("sr1024", 1024)])
def test_a_unit_trains_what_the_recipe_says(
    name: str, picture_px: int, job: dict[str, Any], tmp_path: Path
) -> None:
    """Pictures of the model's size, patches of the network's, the low-resolution input."""
    recipe = load_recipe("ediffi-1024px")
    stage = TrainSuperResolution(recipe=recipe, model=name, embeds=("embed/t5",))
    (unit,) = stage.plan({})
    stage.run(unit, Workspace(tmp_path))  # type: ignore[arg-type]
    network = job["network"]
    assert isinstance(network, EfficientUNetConfig)
    assert (network.image_px, network.low_res_px, network.streams) == (256, 64, STREAMS)
    assert network.widths == recipe.super_resolution[name].network.widths
    assert job["picture_px"] == picture_px
    assert job["low_res"] == LowRes(factor=4)
    assert job["config"] is recipe.super_resolution[name].train
    assert job["snapshot_path"] == tmp_path / "scratch" / name
    assert job["durable"] == tmp_path / "durable"
    assert job["keeps_state"] is False


def test_the_state_is_kept_for_experts_that_need_it(job: dict[str, Any], tmp_path: Path) -> None:
    """Those that start from raw weights or go on with the moments."""
    recipe = load_recipe(
        "ediffi-1024px", ["super_resolution.sr256.experts.start_optimizer=inherit"]
    )
    stage = TrainSuperResolution(recipe=recipe, model="sr256", embeds=("embed/t5",))
    (unit,) = stage.plan({})
    stage.run(unit, Workspace(tmp_path))  # type: ignore[arg-type]
    assert job["keeps_state"] is True
