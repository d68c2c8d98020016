"""What all stages of experts share: the chain of runs from a parent to one expert, its identity."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ediffi.noise import NoiseInterval, SigmaDistribution
from pipelines.recipe_sections.training import ExpertRun, Experts
from pipelines.stage import Json, Outcome, Unit, Workspace
from pipelines.stages.training import train_identity, train_unit
from pipelines.worker.durable import LEVELS_FOLDER

if TYPE_CHECKING:
    from ediffi.train.job import TrainJob
    from ediffi.train.start import Start

_SNAPSHOT = "snapshot"


def experts_identity(experts: Experts, distribution: SigmaDistribution) -> dict[str, Json]:
    """What of a section on experts decides what they learn.

    Settings that came later are left out at their defaults, so old fingerprints hold.
    """
    intervals = experts.intervals(distribution)
    found: dict[str, Json] = {
        "intervals": {name: interval.to_json() for name, interval in intervals.items()},
        "train": train_identity(experts.train),
    }
    for name, default in (
        ("start_weights", "ema"),
        ("start_optimizer", "fresh"),
        ("start_ema", "restart"),
    ):
        if (value := getattr(experts, name)) != default:
            found[name] = value
    plain = {
        name: [_identify(ExpertRun(name=name, interval=interval, config=experts.train))]
        for name, interval in intervals.items()
    }
    runs = {
        name: [_identify(run) for run in experts.runs(name, distribution)] for name in intervals
    }
    return found if runs == plain else {**found, "runs": runs}


@dataclass(kw_only=True)
class ExpertChain:
    """The runs of one unit, each starting where the one before ended.

    With growth by levels there is a run for each tree node on the way to the expert. Each keeps
    checkpoints and snapshot in the unit's durable folder, so that a unit that was killed goes on in
    the run it was in.

    Attributes:
        parent: snapshot of the model that all experts come from.
        parent_images: images that it saw.
        make_job: `train_job` with recipe, workspace, network and pictures already given.
    """

    experts: Experts
    distribution: SigmaDistribution
    workspace: Workspace
    parent: Path
    parent_images: int
    make_job: Callable[..., TrainJob]
    _from: Path = field(init=False)  # snapshot of the run before
    _images: int = field(init=False, default=0)  # of the finished runs of this unit

    def __post_init__(self) -> None:
        self._from = self.parent

    def train(self, unit: Unit) -> Outcome:
        """Train what is still to be trained of one expert."""
        runs = self.experts.runs(unit.id, self.distribution)
        for run in self._skip_finished(runs[:-1]):
            self._train_level(run)
        served = self.experts.intervals(self.distribution)[unit.id]
        outcome = self._train_expert(runs[-1], served)
        if len(runs) == 1 or self.workspace.rank != 0:
            return outcome
        num_images = sum(run.config.final_images for run in runs)
        facts = {**outcome.facts, "chain": [_describe(run) for run in runs]}
        return replace(outcome, num_in=num_images, num_out=num_images, facts=facts)

    def _skip_finished(self, levels: Sequence[ExpertRun]) -> Sequence[ExpertRun]:
        """The levels that are still to be trained; only the last finished one is kept."""
        from ediffi.snapshot import RECORD_NAME
        from ediffi.train.start import STATE_FOLDER

        needs_state = self.experts.needs_parent_state
        mark = f"{STATE_FOLDER}/complete.json" if needs_state else RECORD_NAME
        num_finished = 0
        for number, run in enumerate(levels, start=1):
            if (self._directory(run) / _SNAPSHOT / mark).exists():
                num_finished = number
        for run in levels[:num_finished]:
            self._end(run, self._directory(run) / _SNAPSHOT)
        return levels[num_finished:]

    def _train_level(self, run: ExpertRun) -> None:
        """Train a run before the last, and leave its snapshot in the durable folder."""
        import torch.distributed as dist

        directory, before = self._directory(run), self._from.parent
        job = self._job(run, directory / _SNAPSHOT, directory)
        keeps_state = self.experts.needs_parent_state
        train_unit(job, self._at(directory), keeps_state=keeps_state)
        dist.barrier()
        if self.workspace.rank == 0 and before.parent == directory.parent:
            shutil.rmtree(before)  # the next run starts from this one
        self._end(run, job.snapshot_path)

    def _train_expert(self, run: ExpertRun, served: NoiseInterval) -> Outcome:
        """Train the last run: the unit's result."""
        workspace = self.workspace
        job = self._job(run, workspace.scratch / run.name, workspace.durable)
        if run.interval != served:
            job = replace(job, serves=served)
        outcome = train_unit(job, self._at(workspace.scratch))
        resumed = outcome.timings.get("resumed_from_images", 0.0)
        if workspace.rank != 0:
            return outcome
        return replace(outcome, timings={"resumed_from_images": self._images + resumed})

    def _job(self, run: ExpertRun, snapshot: Path, durable: Path) -> TrainJob:
        return self.make_job(
            config=run.config,
            interval=run.interval,
            start=self._start(),
            base=self.parent,
            snapshot_path=snapshot,
            durable=durable,
        )

    def _start(self) -> Start:
        from ediffi.train.start import STATE_FOLDER, Start

        experts = self.experts
        inherits = experts.start_ema == "inherit"
        return Start(
            snapshot=self._from,
            state=self._from / STATE_FOLDER if experts.needs_parent_state else None,
            weights=experts.start_weights,
            optimizer=experts.start_optimizer,
            ema=experts.start_ema,
            images_before=self.parent_images + self._images if inherits else 0,
        )

    def _at(self, scratch: Path) -> Workspace:
        """The workspace of one run: its rows go on counting where the run before ended."""
        before = self._images

        def report(row: Mapping[str, float]) -> None:
            self.workspace.report({**row, "images": before + row["images"]} if before else row)

        return replace(self.workspace, scratch=scratch, report=report)

    def _directory(self, run: ExpertRun) -> Path:
        return self.workspace.durable / LEVELS_FOLDER / run.name

    def _end(self, run: ExpertRun, snapshot: Path) -> None:
        self._from = snapshot
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
