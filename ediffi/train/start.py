"""How a run begins: random weights, or its parent's; and what else of the parent it carries on.

The paper says only that an expert is initialised from its parent and fine-tuned briefly on its
slice of the noise (eDiff-I section 4). What becomes of optimizer and average it leaves open; here
each is a setting, and the defaults are these:

- weights "ema". The average is the parent's result, what is sampled from and measured; "raw"
  weights carry the noise of the parent's last steps into every child.
- optimizer "fresh". Moments belong to the gradients of the whole axis: they set the step size of
  each weight for losses that an expert never sees again, and they fit raw weights, not averaged
  ones. A short warm-up replaces them. "inherit" is for going on with the same noise.
- average "restart". The parent's average is as slow as the parent's run was long, while a child's
  run is short: carried on, the child's result would lag behind its weights. "inherit" is for
  children that are trained longer than the average reaches back.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from safetensors import safe_open
from torch import Tensor

from ediffi.network import Network, NetworkConfig, build_network, network_to_json
from ediffi.power_ema import FOLDER_NAME, PowerRecord
from ediffi.preconditioning import Denoiser
from ediffi.snapshot import (
    WEIGHTS_NAME,
    Snapshot,
    load_snapshot,
    read_snapshot,
    verify_sha256,
)
from ediffi.train.checkpoint import open_checkpoint
from ediffi.train.ema import HALF_LIFE_KIND, power_kind
from ediffi.train.power_snapshots import link_or_copy

if TYPE_CHECKING:
    from ediffi.train.config import TrainConfig
    from ediffi.train.ema import Averages
    from ediffi.train.job import TrainJob
    from ediffi.train.state import Read, ShardedState

STATE_FOLDER = "state"  # of a snapshot: the checkpoint at its end, for children that need it

StartWeights = Literal["ema", "raw"]
StartOptimizer = Literal["fresh", "inherit"]
StartEma = Literal["restart", "inherit"]


@dataclass(frozen=True, kw_only=True)
class Start:
    """A parent, and what a child takes over from it; the module says why the defaults are so.

    Raises:
        ValueError: raw weights or moments are asked for without the parent's state, or an average
            is carried on without saying how old it is.
    """

    snapshot: Path  # the parent's result
    state: Path | None = None  # the parent's last checkpoint; for "raw" and an inherited optimizer
    weights: StartWeights = "ema"
    optimizer: StartOptimizer = "fresh"
    ema: StartEma = "restart"
    images_before: int = 0  # for an inherited average: images that all ancestors saw, its age

    def __post_init__(self) -> None:
        """Check the fields; see the class."""
        for field, choices in (
            ("weights", get_args(StartWeights)),
            ("optimizer", get_args(StartOptimizer)),
            ("ema", get_args(StartEma)),
        ):
            if (found := getattr(self, field)) not in choices:
                raise ValueError(f"start.{field} must be one of {', '.join(choices)}: {found!r}")
        if self.needs_state and self.state is None:
            raise ValueError(
                f"start.state must name the last checkpoint of {self.snapshot}: weights "
                f"{self.weights!r} with optimizer {self.optimizer!r} are not in the snapshot"
            )
        if (self.ema == "inherit") != (self.images_before > 0):
            raise ValueError(
                "start.images_before must be positive where the average is inherited and 0 where "
                f"it restarts, got {self.images_before} with ema {self.ema!r}"
            )

    @property
    def needs_state(self) -> bool:
        """Whether the snapshot alone is not enough."""
        return self.weights == "raw" or self.optimizer == "inherit"


def build_denoiser(job: TrainJob) -> tuple[Denoiser, int]:
    """Make the denoiser to train, and count its parameters.

    The weights are random, as a function of the seed alone, or the parent's.

    Raises:
        ValueError: the parent has another architecture or preconditioning.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(job.config.seed)
        network = build_network(job.network)
    if job.start is not None:
        parent, parent_denoiser = load_snapshot(job.start.snapshot)
        _check_parent(job, job.start, parent)
        network.load_state_dict(parent_denoiser.network.state_dict())
        if job.start.weights == "raw":
            _load_raw(network, job.start)
    return Denoiser(network, job.preconditioning), network.num_parameters


def images_before(job: TrainJob) -> int:
    """How old the average already is when the run begins."""
    return 0 if job.start is None else job.start.images_before


def carry_over(job: TrainJob, state: ShardedState, averages: Averages) -> None:
    """Take over the parent's moments and average as the job says; weights are in place already.

    Called by all ranks together, at the beginning of a run that has no checkpoint of its own.

    Raises:
        ValueError: the parent has no average that this run could carry on.
    """
    start = job.start
    if start is None:
        return
    if start.optimizer == "inherit":
        assert start.state is not None  # see Start
        checkpoint = open_checkpoint(start.state)
        averaged = _files({"weights": _weights_path(start.snapshot)})

        def read(kind: str, name: str, start_index: int, num_elements: int) -> Tensor:
            is_averaged = kind == "weights" and start.weights == "ema"
            source = averaged if is_averaged else checkpoint.read
            return source(kind, name, start_index, num_elements)

        state.load(read, optimizer=True, num_steps=checkpoint.progress.num_steps)
    if start.ema == "inherit":
        averages.load(_parent_averages(start, job.config))


def publish_state(checkpoint_path: Path, snapshot_path: Path) -> None:
    """Add the newest checkpoint of a finished run to its snapshot, for children that need it.

    Called by one rank, after training. The files get a second name where the file system can do
    that, and the checkpoint's marker comes last.

    Raises:
        FileNotFoundError: there is no complete checkpoint.
    """
    complete = sorted(checkpoint_path.glob("images-*/complete.json"))
    if not complete:
        raise FileNotFoundError(f"no complete checkpoint in {checkpoint_path}")
    source, target = complete[-1].parent, snapshot_path / STATE_FOLDER
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == complete[-1].name):
        link_or_copy(path, target / path.name)


# -- the parent -----------------------------------------------------------------------------------


def _check_parent(job: TrainJob, start: Start, parent: Snapshot) -> None:
    required = _architecture(job.network) | job.preconditioning.to_json()
    found = _architecture(parent.network) | parent.preconditioning.to_json()
    differing = [
        f"{field} must be {found.get(field)!r} as in the parent, got {required.get(field)!r}"
        for field in {**required, **found}
        if required.get(field) != found.get(field)
    ]
    if differing:
        raise ValueError(
            f"the network cannot start from snapshot {start.snapshot}: {'; '.join(differing)}. "
            "Use the parent's network settings, or train another parent"
        )


def _architecture(network: NetworkConfig) -> dict[str, Any]:
    """Everything that shapes the weights; how often streams are dropped does not."""
    streams = tuple(replace(stream, dropout=0.0) for stream in network.streams)
    return network_to_json(replace(network, streams=streams))


@torch.no_grad()
def _load_raw(network: Network, start: Start) -> None:
    assert start.state is not None  # see Start
    checkpoint = open_checkpoint(start.state)
    for name, parameter in network.named_parameters():
        parameter.view(-1).copy_(checkpoint.read("weights", name, 0, parameter.numel()))


def _weights_path(snapshot: Path) -> Path:
    """The averaged weights of a snapshot, checked."""
    _, sha256 = read_snapshot(snapshot)
    verify_sha256(snapshot / WEIGHTS_NAME, sha256)
    return snapshot / WEIGHTS_NAME


def _files(paths: Mapping[str, Path]) -> Read:
    """Read every kind from a safetensors file of its own, one parameter at a time."""
    opened = {kind: safe_open(path, "pt") for kind, path in paths.items()}

    def read(kind: str, name: str, start: int, num_elements: int) -> Tensor:
        flat: Tensor = opened[kind].get_tensor(name).flatten()
        return flat[start : start + num_elements]

    return read


def _parent_averages(start: Start, config: TrainConfig) -> Read:
    """The parent's averages at its end, under the names that this run's have.

    Raises:
        ValueError: profile power, and the parent did not track the same widths to its end.
    """
    if config.ema_profile == "half_life":
        return _files({HALF_LIFE_KIND: _weights_path(start.snapshot)})
    folder = start.snapshot / FOLDER_NAME
    if not folder.exists():
        raise ValueError(
            f"an average of profile power cannot be carried on from {start.snapshot}, whose own is "
            "of profile half_life: set ema_profile of the parent to power, or restart the average"
        )
    record = PowerRecord.read(folder)
    at_end = {one.std: one for one in record.averages if one.images == record.times[-1]}
    if missing := [std for std in config.ema_track_stds if std not in at_end]:
        raise ValueError(
            f"train.ema_track_stds: the averages of width {missing} cannot be carried on from "
            f"{folder}, which has {sorted(at_end)}: track the parent's widths, or restart"
        )
    found = record.images_before + record.times[-1]
    if found != start.images_before:
        raise ValueError(
            f"start.images_before must be {found}, the age of the averages in {folder}, "
            f"got {start.images_before}"
        )
    paths = {}
    for std in config.ema_track_stds:
        paths[power_kind(std)] = folder / at_end[std].file
        verify_sha256(folder / at_end[std].file, at_end[std].sha256)
    return _files(paths)
