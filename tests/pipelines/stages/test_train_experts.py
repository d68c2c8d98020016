"""The stage of the experts: what is in its fingerprint, and chains of runs that grow by levels."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ediffi.noise import NoiseInterval
from ediffi.snapshot import read_snapshot
from ediffi.train.job import TrainJob
from ediffi.train.start import publish_state
from pipelines.recipe import Recipe
from pipelines.recipe_file import load_recipe
from pipelines.stage import Json, Outcome, Unit, Workspace
from pipelines.stages import train_experts
from pipelines.stages.train_experts import TrainExperts
from pipelines.worker.durable import PROGRESS_FILE, Durable, read_progress
from tests.ediffi.train.toy import CONFIG, NETWORK, Killed, after, make_job, run

pytestmark = pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning")

TRAIN = (
    "experts.train={total_images: 32, batch_images: 16, ema_half_life_images: 64, "
    "checkpoint_images: 16, log_images: 16, seed: 5}"
)
SPLIT = "experts.split=[{name: low, quantiles: [0, 0.25]}, {name: rest, quantiles: [0.25, 1]}]"


def recipe_of(*overrides: str) -> Recipe:
    """The demo's recipe with other experts."""
    return load_recipe("demo", [TRAIN, *overrides])


def identity(*overrides: str) -> Json:
    """What enters the stage's fingerprint."""
    return TrainExperts(recipe=recipe_of(*overrides), embeds=()).identity()


def test_settings_that_came_later_leave_old_fingerprints_alone() -> None:
    """At their defaults, and said in full, they are not in the identity at all."""
    assert set(identity()) == {"intervals", "train", "image_px", "resize"}
    said = ["growth=direct", "start_weights=ema", "start_optimizer=fresh", "start_ema=restart"]
    assert identity(*(f"experts.{one}" for one in said)) == identity()
    own = "{name: a, quantiles: [0, 1], train: {total_images: 32}, trains_on: {quantiles: [0, 1]}}"
    assert identity(f"experts.split=[{own}]") == identity(
        "experts.split=[{name: a, quantiles: [0, 1]}]"
    )


@pytest.mark.parametrize(
    "override",
    [
        "experts.growth=levels",
        "experts.start_weights=raw",
        "experts.start_optimizer=inherit",
        "experts.start_ema=inherit",
    ],
)
def test_every_other_value_is_in_the_fingerprint(override: str) -> None:
    """A setting that changes what is learnt changes the address."""
    assert identity(override) != identity()


def test_settings_of_single_runs_are_in_the_fingerprint() -> None:
    """One expert's own length or range, and the length of a level; not what changes nothing."""
    levels = "experts.growth=levels"
    split = "experts.split=[{name: a, quantiles: [0, 0.5], %s}, {name: b, quantiles: [0.5, 1]}]"
    plain = identity(split.replace(", %s", ""))
    assert identity(split % "train: {total_images: 64}") != plain
    assert identity(split % "trains_on: {quantiles: [0, 0.6]}") != plain
    assert identity(split % "train: {log_images: 64}") == plain
    assert identity(levels, "experts.level.total_images=64") != identity(levels)
    assert identity(levels, "experts.level.log_images=64") == identity(levels)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """A base of two steps, published with its state."""
    directory = tmp_path_factory.mktemp("base")
    config = replace(CONFIG, total_images=32, warmup_images=0)
    job = make_job(directory, config=config, snapshot_path=directory / "base")
    run(job)
    publish_state(job.checkpoint_path, job.snapshot_path)
    return job


class Unattended:
    """Runs units of the stage on the toy data, without a store around them."""

    def __init__(self, directory: Path, recipe: Recipe) -> None:
        self.directory = directory
        self.stage = TrainExperts(recipe=recipe, embeds=())

    def run(self, unit: str, should_stop: Callable[[], bool] = lambda: False) -> Outcome:
        durable = self.durable(unit)
        durable.mkdir(parents=True, exist_ok=True)
        scratch = self.directory / "scratch"
        scratch.mkdir(exist_ok=True)
        with Durable(durable) as kept:
            workspace = Workspace(
                scratch=scratch,
                durable=durable,
                inputs={"base": None},  # type: ignore[dict-item]
                report=kept.report,
                should_stop=should_stop,
            )
            return self.stage.run(Unit(id=unit), workspace)

    def durable(self, unit: str) -> Path:
        return self.directory / "durable" / unit

    def levels(self, unit: str) -> list[str]:
        return sorted(path.name for path in (self.durable(unit) / "levels").iterdir())

    def images(self, unit: str) -> list[float]:
        return [row["images"] for row in read_progress(self.durable(unit))]


@pytest.fixture
def unattended(base: TrainJob, monkeypatch: pytest.MonkeyPatch) -> type[Unattended]:
    """Make the stage read the toy data and the module's base."""

    def job_of(
        recipe: Recipe, workspace: Workspace, *, durable: Path, network: Any, **fields: Any
    ) -> TrainJob:
        job = replace(base, network=network, checkpoint_path=durable / "checkpoints", **fields)
        jobs.append(job)
        return job

    jobs: list[TrainJob] = []
    monkeypatch.setattr(train_experts, "train_job", job_of)
    monkeypatch.setattr(train_experts, "network_config", lambda recipe, inputs: NETWORK)
    monkeypatch.setattr(train_experts, "snapshot_paths", lambda _: {"base": base.snapshot_path})
    monkeypatch.setattr(Unattended, "jobs", jobs, raising=False)
    return Unattended


def weights_of(outcome: Outcome, directory: Path) -> bytes:
    """Bytes of the unit's published weights."""
    (name,) = (name for name in outcome.files if name.endswith("model.safetensors"))
    return (directory / "scratch" / name).read_bytes()


def test_an_expert_grows_through_its_ancestors_and_survives_kills(
    tmp_path: Path, base: TrainJob, unattended: type[Unattended]
) -> None:
    """Killed in every run of its chain and started again, it ends with the same bytes."""
    recipe = recipe_of(SPLIT.replace("0.25", "0.125"), "experts.growth=levels")
    whole = unattended(tmp_path / "whole", recipe)
    expected = whole.run("low")

    killed = unattended(tmp_path / "killed", recipe)
    for _ in range(4):  # each attempt keeps one batch, and loses the next
        with pytest.raises(Killed):
            killed.run("low", after(2, Killed))
    found = killed.run("low")

    assert weights_of(found, killed.directory) == weights_of(expected, whole.directory)
    assert found.facts == expected.facts
    assert [(one["name"], one["images"]) for one in found.facts["chain"]] == [
        ("E1_0", 32),
        ("E2_0", 32),
        ("low", 32),
    ]
    assert found.num_in == found.num_out == 96
    assert whole.images("low") == killed.images("low") == [16, 32, 48, 64, 80, 96]
    assert whole.levels("low") == ["E2_0"]  # the parent alone is kept
    starts = [job.start.snapshot.parent.name for job in unattended.jobs[:3]]  # type: ignore
    assert starts == [base.snapshot_path.parent.name, "E1_0", "E2_0"]
    assert len({job.config.seed for job in unattended.jobs[:3]}) == 3  # type: ignore


def test_an_expert_across_the_median_comes_from_the_base(
    tmp_path: Path, base: TrainJob, unattended: type[Unattended]
) -> None:
    """The complement has no ancestors: one run, and a receipt as without levels."""
    direct = unattended(tmp_path / "direct", recipe_of(SPLIT))
    grown = unattended(tmp_path / "grown", recipe_of(SPLIT, "experts.growth=levels"))
    expected, found = direct.run("rest"), grown.run("rest")
    assert found == expected
    assert "chain" not in found.facts
    assert weights_of(found, grown.directory) == weights_of(expected, direct.directory)
    assert not (grown.durable("rest") / "levels").exists()


def test_a_chain_hands_on_state_where_that_is_asked_for(
    tmp_path: Path, base: TrainJob, unattended: type[Unattended]
) -> None:
    """Raw weights, moments and an ageing average go from the base through a level to the expert."""
    settings = ["start_weights=raw", "start_optimizer=inherit", "start_ema=inherit"]
    said = [f"experts.{one}" for one in settings]
    recipe = recipe_of(SPLIT, "experts.growth=levels", *said)
    chain = unattended(tmp_path, recipe)
    chain.run("low")
    first, second = (job.start for job in unattended.jobs)  # type: ignore
    assert first.state == base.snapshot_path / "state"
    assert second.state == chain.durable("low") / "levels" / "E1_0" / "snapshot" / "state"
    age = recipe.base.final_images
    assert (first.images_before, second.images_before) == (age, age + 32)
    marker = next((chain.durable("low") / "checkpoints").glob("images-*32/complete.json"))
    assert json.loads(marker.read_text())["progress"]["num_steps"] == 2 + 2 + 2


def test_an_expert_may_train_on_more_than_it_serves(
    tmp_path: Path, unattended: type[Unattended]
) -> None:
    """Neighbours overlap in training; snapshots still tile the axis."""
    split = SPLIT.replace("0.25]}", "0.25], trains_on: {quantiles: [0, 0.4]}}")
    recipe = recipe_of(split)
    unit = unattended(tmp_path, recipe)
    unit.run("low")
    (job,) = unattended.jobs  # type: ignore
    distribution = recipe.noise.distribution
    assert job.interval == NoiseInterval(0.0, distribution.quantile(0.4))
    snapshot, _ = read_snapshot(unit.directory / "scratch" / "low")
    assert snapshot.interval == NoiseInterval(0.0, distribution.quantile(0.25))
    assert (unit.durable("low") / PROGRESS_FILE).exists()
