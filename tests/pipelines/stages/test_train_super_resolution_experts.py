"""Tests of the stage of a super-resolution model's experts: they start from it and are like it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ediffi.degradation import LowRes
from ediffi.noise import tree_node
from ediffi.snapshot import load_snapshot, read_snapshot
from ediffi.train.job import TrainJob
from pipelines.recipe import Recipe
from pipelines.recipe_file import load_recipe
from pipelines.stage import Manifest, Outcome, Unit, Workspace
from pipelines.stages import train_super_resolution
from pipelines.stages.train_super_resolution import TrainSuperResolution
from pipelines.stages.train_super_resolution_experts import TrainSuperResolutionExperts
from pipelines.worker.durable import Durable
from tests.ediffi.train.toy import STREAMS, make_job
from tests.pipelines.fake_stages import manifest, receipt

pytestmark = pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning")

TRAIN = """{total_images: 32, batch_images: 16, ema_half_life_images: 16, checkpoint_images: 16,
            log_images: 16, seed: 3}"""
MODEL = f"""{{sr8: {{
    image_px: 8, low_res_px: 4,
    network: {{widths: [8, 8], num_blocks: [1, 1], cross_attention_px: [4], head_width: 8,
              context_width: 16, embedding_width: 8}},
    train: {TRAIN}, experts: {{train: {TRAIN}}}}}}}"""


def recipe_of(*overrides: str) -> Recipe:
    """The demo's base at 4 px, and a model of 8 px with two experts."""
    return load_recipe("demo", ["network.image_px=4", f"super_resolution={MODEL}", *overrides])


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[TrainJob]:
    """Stages read the toy data; the list gets the jobs that they make."""
    made: list[TrainJob] = []
    toy = make_job(tmp_path / "toy")

    def job_of(recipe: Recipe, workspace: Workspace, *, durable: Path, **fields: Any) -> TrainJob:
        made.append(replace(toy, checkpoint_path=durable / "checkpoints", **fields))
        return made[-1]

    monkeypatch.setattr(train_super_resolution, "train_job", job_of)
    monkeypatch.setattr(train_super_resolution, "stream_configs", lambda *_: STREAMS)
    return made


def run(
    stage: TrainSuperResolution | TrainSuperResolutionExperts,
    unit: str,
    directory: Path,
    **inputs: Manifest,
) -> Outcome:
    """Do one unit; its files lie in `directory`."""
    durable = directory / "durable" / unit
    durable.mkdir(parents=True, exist_ok=True)
    with Durable(durable) as kept:
        workspace = Workspace(
            scratch=directory,
            durable=durable,
            inputs={f"super_resolution/{name}": one for name, one in inputs.items()},
            report=kept.report,
        )
        return stage.run(Unit(id=unit), workspace)


def train_parent(recipe: Recipe, directory: Path) -> Manifest:
    """The finished stage of the model itself."""
    run(TrainSuperResolution(recipe=recipe, model="sr8", embeds=()), "sr8", directory)
    return manifest(directory, receipt("sr8"), stage="super_resolution/sr8")


def test_experts_start_from_their_model_and_enlarge_as_it_does(
    tmp_path: Path, jobs: list[TrainJob]
) -> None:
    """Each has a half of the noise, the same input, and other weights than the model."""
    torch.set_num_threads(1)
    recipe = recipe_of()
    parent = train_parent(recipe, tmp_path / "parent")
    stage = TrainSuperResolutionExperts(recipe=recipe, model="sr8", embeds=())
    units = [unit.id for unit in stage.plan({})]
    assert units == ["low", "high"]
    for unit in units:
        run(stage, unit, tmp_path / "experts", sr8=parent)

    parent_job, *expert_jobs = jobs
    for index, (unit, job) in enumerate(zip(units, expert_jobs, strict=True)):
        assert job.start is not None
        assert job.start.snapshot == job.base == tmp_path / "parent" / "sr8"
        assert job.network == parent_job.network
        assert (job.picture_px, job.low_res) == (8, LowRes(factor=2))
        snapshot, _ = read_snapshot(tmp_path / "experts" / unit)
        assert snapshot.interval == tree_node(1, index, recipe.noise.distribution)
        assert snapshot.network == parent_job.network
    weights = [
        load_snapshot(folder)[1].network.conv_in.weight
        for folder in (tmp_path / "parent" / "sr8", *(tmp_path / "experts" / one for one in units))
    ]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_experts_may_go_on_with_the_state_of_their_model(
    tmp_path: Path, jobs: list[TrainJob]
) -> None:
    """The model keeps its state for them, and an average that goes on knows its age."""
    torch.set_num_threads(1)
    settings = ("start_weights=raw", "start_optimizer=inherit", "start_ema=inherit")
    recipe = recipe_of(*(f"super_resolution.sr8.experts.{one}" for one in settings))
    parent = train_parent(recipe, tmp_path / "parent")
    stage = TrainSuperResolutionExperts(recipe=recipe, model="sr8", embeds=())
    run(stage, "high", tmp_path / "experts", sr8=parent)
    start = jobs[-1].start
    assert start is not None
    assert start.state == tmp_path / "parent" / "sr8" / "state"
    assert start.images_before == 32
    assert (tmp_path / "experts" / "high" / "snapshot.json").exists()
