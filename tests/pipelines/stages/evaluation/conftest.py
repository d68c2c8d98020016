"""A run of a tiny recipe with random networks: all of it is real but the training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from ediffi.network import build_network
from ediffi.noise import WHOLE, NoiseInterval, paper_intervals
from ediffi.preconditioning import Preconditioning
from ediffi.snapshot import Snapshot, save_snapshot
from pipelines.demo.shapes import write_data_set
from pipelines.planning import PlannedStage, contents_of, describe, plan
from pipelines.recipe import Recipe
from pipelines.recipe_file import load_recipe
from pipelines.stage import Json, Manifest, Outcome, Unit
from pipelines.stages.training import network_config
from pipelines.store.ledger import Ledger
from tests.pipelines.in_process import run_recipe
from tests.tiny_encoders import write_t5

WORDS = "a red yellow green cyan blue magenta circle square triangle ring on the left right at top"
RECIPE = """
name: evaluated
seed: 3
data:
  source: folder
  list: {data}/captions.parquet
  folder: {data}
  path_column: url
  key_column: key
  held_out: {{column: split, value: held_out}}
  image_px: 16
clip_fit: {{image_px: 16, num_steps: 2, batch_images: 16, width: 32}}
encoders:
  t5: {{family: transformers, weights: {data}/t5, max_tokens: 16, storage_dtype: fp32}}
  clip_text: {{family: open_clip_text, weights: fitted, storage_dtype: fp32}}
  clip_image: {{family: open_clip_image, weights: fitted, storage_dtype: fp32, dropout: 0.9}}
network:
  patch_px: 2
  widths: [8, 8]
  num_blocks: 1
  cross_attention_px: [4]
  head_width: 8
  context_width: 8
  embedding_width: 16
base: &train
  total_images: 32
  batch_images: 16
  ema_half_life_images: 16
  checkpoint_images: 16
  log_images: 16
experts:
  split: paper
  train: *train
sample:
  prompts: [a red circle on the left]
  seeds: [0, 1]
  sampler: dpm++2m
  num_steps: 3
  num_held_out_captions: 8
evaluate:
  num_bins: 2
  draws_per_bin: 8
  num_resamples: 20
  features: {{kind: clip}}
  alignment: clip
  guidance_curve: {{scales: [1, 4], num_pictures: 6}}
  text_ablation: {{num_pictures: 6}}
  attention: {{sigmas: [0.05, 1, 40], num_samples: 6}}
  painting:
    cases:
    - prompt: a red circle on the left
      phrases: [{{phrase: red circle, box: [0, 0, 0.5, 1]}}]
    seeds: [0, 1, 2]
  style: {{column: shape, num_pictures: 8}}
"""


@dataclass(frozen=True)
class Store:
    """A finished run and what it can be asked."""

    recipe: Recipe
    ledger: Ledger
    done: tuple[str, ...]  # `stage/unit` of all that was done
    path: Path

    def stage(self, name: str) -> PlannedStage:
        """One stage of the plan."""
        return next(one for one in plan(self.recipe, self.ledger) if one.name == name)

    def folder(self, name: str) -> Path:
        """Where a stage lies."""
        folder = self.stage(name).record.directory
        assert isinstance(folder, Path)
        return folder

    def inputs(self, name: str) -> dict[str, Manifest]:
        """What a stage reads."""
        inputs = self.stage(name).inputs
        return {one: self.ledger.stage(one, key).manifest() for one, key in inputs.items()}

    def document(self, unit: str) -> Json:
        """What a measurement found."""
        return json.loads((self.folder("evaluate") / f"{unit}.json").read_text())

    def changed(self, *overrides: str) -> Recipe:
        """The recipe with other settings."""
        return load_recipe(str(self.path), overrides)


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Everything from pictures to report."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("evaluated")
    write_data_set(folder / "data", image_px=16, num_train=24, num_per_held_out=1)
    write_t5(folder / "data" / "t5", tuple(WORDS.split()))
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(data=folder / "data"))
    recipe, ledger = load_recipe(str(path)), Ledger.open(folder / "store")
    run_recipe(recipe, ledger, selected=["embed"])
    _train_nothing(recipe, ledger)
    done = run_recipe(recipe, ledger, selected=["report"])
    torch.set_num_threads(threads)
    return Store(recipe, ledger, tuple(done), path)


def _train_nothing(recipe: Recipe, ledger: Ledger) -> None:
    """Publish random networks as base and experts."""
    intervals = paper_intervals(recipe.noise.distribution)
    _publish(recipe, ledger, "base", {"base": WHOLE})
    _publish(recipe, ledger, "experts", intervals)


def _publish(
    recipe: Recipe, ledger: Ledger, stage: str, intervals: Mapping[str, NoiseInterval]
) -> None:
    planned = next(one for one in plan(recipe, ledger) if one.name == stage)
    inputs = {name: ledger.stage(name, key).manifest() for name, key in planned.inputs.items()}
    contents, identity = contents_of(inputs, inputs), describe(planned.stage, planned.inputs)
    planned.record.open(identity, contents)
    config = network_config(recipe, inputs)
    for seed, (name, interval) in enumerate(intervals.items()):
        scratch = ledger.new_scratch()
        network, generator = build_network(config), torch.Generator().manual_seed(seed)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.4, generator=generator)
        snapshot = Snapshot(
            network=config,
            preconditioning=Preconditioning(sigma_data=recipe.noise.sigma_data),
            distribution=recipe.noise.distribution,
            interval=interval,
            images_seen=32,
        )
        save_snapshot(scratch / name, snapshot, network.state_dict())
        files = [str(path.relative_to(scratch)) for path in sorted((scratch / name).iterdir())]
        outcome = Outcome(files=files, num_in=1, num_out=1)
        planned.record.publish(Unit(id=name), outcome, scratch, seconds=1.0, attempt=1)
        shutil.rmtree(scratch)
    planned.record.complete(stage, identity, planned.inputs, contents, list(intervals), "run-here")
