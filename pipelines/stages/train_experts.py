"""Fine-tune one expert a noise interval, from the base's snapshot, directly or level by level."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ediffi.noise import NoiseInterval
from pipelines.durable import LEVELS_FOLDER
from pipelines.recipe import Recipe
from pipelines.recipe_training import ExpertRun
from pipelines.stage import Json, Manifest, Outcome, Unit, Workspace
from pipelines.stages.inputs import snapshot_paths
from pipelines.stages.training import network_config, train_identity, train_job, train_unit

if TYPE_CHECKING:
    from ediffi.train.job import TrainJob
    from ediffi.train.start import Start

_SNAPSHOT = "snapshot"


@dataclass(frozen=True, kw_only=True)
class TrainExperts:
    """One unit is one expert; they neither see nor wait for one another.

    With growth by levels, a unit trains the chain of tree nodes that leads to its expert, one run
    after the other. Each keeps checkpoints and snapshot in the unit's durable folder, so that a
    unit that was killed goes on in the run it was in.
    """

    recipe: Recipe
    embeds: tuple[str, ...]
    name: ClassVar[str] = "experts"
    version: ClassVar[int] = 1
    gang: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[str, ...]:
        return ("base", "ingest", *self.embeds)

    def identity(self) -> Json:
        return {
            "intervals": {name: interval.to_json() for name, interval in self._intervals.items()},
            "train": train_identity(self.recipe.experts.train),
            # the base's settings reach this stage through its fingerprint; these two are read again
            "image_px": self.recipe.base_px,
            "resize": self.recipe.data.resize,
            **self._particulars(),
        }

    def plan(self, inputs: Mapping[str, Manifest]) -> list[Unit]:
        return [Unit(id=name) for name in self._intervals]

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        runs = self.recipe.experts.runs(unit.id, self.recipe.noise.distribution)
        chain = _Chain(self.recipe, workspace, snapshot_paths(workspace.inputs["base"])["base"])
        for run in chain.skip_finished(runs[:-1]):
            chain.train_level(run)
        outcome = chain.train_expert(runs[-1], self._intervals[unit.id])
        if len(runs) == 1 or workspace.rank != 0:
            return outcome
        num_images = sum(run.config.final_images for run in runs)
        facts = {**outcome.facts, "chain": [_describe(run) for run in runs]}
        return replace(outcome, num_in=num_images, num_out=num_images, facts=facts)

    @property
    def _intervals(self) -> dict[str, NoiseInterval]:
        return self.recipe.experts.intervals(self.recipe.noise.distribution)

    def _particulars(self) -> dict[str, Json]:
        """Settings that came later; left out at their defaults, so old fingerprints hold."""
        experts, distribution = self.recipe.experts, self.recipe.noise.distribution
        found: dict[str, Json] = {
            field: value
            for field, default in (
                ("start_weights", "ema"),
                ("start_optimizer", "fresh"),
                ("start_ema", "restart"),
            )
            if (value := getattr(experts, field)) != default
        }
        plain = {
            name: [_identify(ExpertRun(name=name, interval=interval, config=experts.train))]
            for name, interval in self._intervals.items()
        }
        runs = {
            name: [_identify(run) for run in experts.runs(name, distribution)]
            for name in self._intervals
        }
        if runs != plain:
            found["runs"] = runs
        return found


class _Chain:
    """The runs of one unit, each starting where the one before ended.

    Args:
        base: its snapshot.
    """

    def __init__(self, recipe: Recipe, workspace: Workspace, base: Path) -> None:
        self._recipe, self._workspace = recipe, workspace
        self._base = self._parent = base
        self._images = 0  # of the finished runs of this unit

    def skip_finished(self, levels: Sequence[ExpertRun]) -> Sequence[ExpertRun]:
        """The levels that are still to be trained; only the last finished one is kept."""
        from ediffi.snapshot import RECORD_NAME
        from ediffi.train.start import STATE_FOLDER

        needs_state = self._recipe.experts.needs_parent_state
        mark = f"{STATE_FOLDER}/complete.json" if needs_state else RECORD_NAME
        num_finished = 0
        for number, run in enumerate(levels, start=1):
            if (self._directory(run) / _SNAPSHOT / mark).exists():
                num_finished = number
        for run in levels[:num_finished]:
            self._end(run, self._directory(run) / _SNAPSHOT)
        return levels[num_finished:]

    def train_level(self, run: ExpertRun) -> None:
        """Train a run before the last, and leave its snapshot in the durable folder."""
        import torch.distributed as dist

        directory, before = self._directory(run), self._parent.parent
        job = self._job(run, directory / _SNAPSHOT, directory)
        keeps_state = self._recipe.experts.needs_parent_state
        train_unit(job, self._at(directory), keeps_state=keeps_state)
        dist.barrier()
        if self._workspace.rank == 0 and before.parent == directory.parent:
            shutil.rmtree(before)  # the next run starts from this one
        self._end(run, job.snapshot_path)

    def train_expert(self, run: ExpertRun, served: NoiseInterval) -> Outcome:
        """Train the last run: the unit's result."""
        workspace = self._workspace
        job = self._job(run, workspace.scratch / run.name, workspace.durable)
        if run.interval != served:
            job = replace(job, serves=served)
        outcome = train_unit(job, self._at(workspace.scratch))
        resumed = outcome.timings.get("resumed_from_images", 0.0)
        if workspace.rank != 0:
            return outcome
        return replace(outcome, timings={"resumed_from_images": self._images + resumed})

    def _job(self, run: ExpertRun, snapshot: Path, durable: Path) -> TrainJob:
        return train_job(
            self._recipe,
            self._workspace,
            network=network_config(self._recipe, self._workspace.inputs),
            config=run.config,
            interval=run.interval,
            start=self._start(),
            base=self._base,
            snapshot_path=snapshot,
            durable=durable,
        )

    def _start(self) -> Start:
        from ediffi.train.start import STATE_FOLDER, Start

        experts = self._recipe.experts
        inherits = experts.start_ema == "inherit"
        return Start(
            snapshot=self._parent,
            state=self._parent / STATE_FOLDER if experts.needs_parent_state else None,
            weights=experts.start_weights,
            optimizer=experts.start_optimizer,
            ema=experts.start_ema,
            images_before=self._recipe.base.final_images + self._images if inherits else 0,
        )

    def _at(self, scratch: Path) -> Workspace:
        """The workspace of one run: its rows go on counting where the run before ended."""
        before = self._images

        def report(row: Mapping[str, float]) -> None:
            self._workspace.report({**row, "images": before + row["images"]} if before else row)

        return replace(self._workspace, scratch=scratch, report=report)

    def _directory(self, run: ExpertRun) -> Path:
        return self._workspace.durable / LEVELS_FOLDER / run.name

    def _end(self, run: ExpertRun, snapshot: Path) -> None:
        self._parent = snapshot
        self._images += run.config.final_images


def _identify(run: ExpertRun) -> Json:
    """What of a run decides its outcome."""
    return {
        "name": run.name,
        "interval": run.interval.to_json(),
        "train": train_identity(run.config),
    }


def _describe(run: ExpertRun) -> Json:
    """What a receipt says of a run."""
    return {
        "name": run.name,
        "interval": run.interval.to_json(),
        "images": run.config.final_images,
    }
