"""What an orchestrator costs when the work is nothing: whole processes, beside the peers.

`python -m benchmarks.orchestration [--runs N] [--json FILE] [--sides NAME...] [--measures NAME...]`

The toy has ten steps that do nothing: a source, five beside one another, a join, and a chain of
three. It is run in an empty folder (`cold`), run again (`finished`), and run once more after a
setting of the first step of the chain was changed (`changed`: three steps). Apart from that a
hundred steps stand beside one another between a source and a join (`wide`). Each step writes a
line into a log, and a side that does more or fewer than it should is an error, not a result.

`first` is `cold` where nothing was ever run: only ours keeps something beside the store (MLflow's
empty database, in the user's cache).

Ours runs real stages of a user, through `ediffi run`: receipts, manifests and MLflow included; the
hundred are units of one stage. Every peer is run by its own command where it has one, at its
strictest cache. Prefect is taken twice, with the server that it starts for itself and with one
that stands already; Dagster twice, with a process for each step, as it does by default, and all in
one process.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from benchmarks.interleave import our_versions, row, write_rows
from benchmarks.peers.orchestrators import (
    DAGSTER,
    FILES,
    METAFLOW,
    OURS,
    PREFECT,
    RAY,
    Orchestrator,
    done,
)
from benchmarks.peers.prefect_server import PrefectServer
from benchmarks.report import Row

COMMAND = "python -m benchmarks.orchestration"
NUM_DONE = {"start": 0, "first": 10, "cold": 10, "finished": 0, "changed": 3, "wide": 102}
MEASURES = {
    "first": "ten no-op stages, cold, nothing kept for the user",
    "cold": "ten no-op stages, cold",
    "finished": "ten no-op stages, finished",
    "changed": "ten no-op stages, one changed",
    "wide": "a hundred no-op units beside one another",
}
FINISHED_LIMIT_S = 1.0  # a finished pipeline answers in
COLD_LIMIT_S = 1.0  # cold adds this to Ray's own start
Seconds = dict[str, dict[str, list[float]]]  # side -> measure -> one value a run


@dataclass(frozen=True, kw_only=True)
class Toy:
    """The toy on one side.

    Args:
        label: of the side, in tables.
        files: scripts of benchmarks/peers/toys that stand beside one another in the folder.
        commands: by measure, what its interpreter is given; a measure that is not there is one
            that the side has no way to do.
        variables: by measure, what is set besides.
        has_server: a Prefect server stands beside it.
    """

    label: str
    side: Orchestrator
    files: tuple[str, ...]
    commands: Mapping[str, tuple[str, ...]]
    variables: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    has_server: bool = False

    def prepare(self, folder: Path) -> None:
        """Put the scripts and recipes into a new folder."""
        folder.mkdir(parents=True)
        for name in ("toy.py", *self.files):
            shutil.copy(FILES / name, folder / name)
        if self.side is OURS:
            write_recipes(folder)

    def measure(self, measure: str, folder: Path, server: Mapping[str, str]) -> float:
        """Seconds of one measure.

        Raises:
            PeerError: the command failed.
            RuntimeError: it did other steps than it should.
        """
        more = {**server, **self.variables.get(measure, {})}
        seconds = self.side.run(folder, *self.commands[measure], more=more)
        if len(steps := done(folder)) != NUM_DONE[measure]:
            raise RuntimeError(
                f"{self.label}, {measure}: {NUM_DONE[measure]} steps had to be done, done were "
                f"{len(steps)}: {', '.join(sorted(steps)[:12])}; see {folder}"
            )
        return seconds


# -- ours -----------------------------------------------------------------------------------------


def write_recipes(folder: Path) -> None:
    """`ten.yaml` and `wide.yaml`, whose own stages are never asked for, only the custom ones."""
    (folder / "captions.csv").write_text("path,caption\na.png,nothing\n")
    middle = {name: _no_op("source") for name in ("a", "b", "c", "d", "e")}
    chain = {"first": _no_op("join"), "second": _no_op("first"), "third": _no_op("second")}
    ten = {"source": _no_op(), **middle, "join": _no_op(*middle), **chain}
    wide = {"source": _no_op(), "each": _no_op("source"), "join": _no_op("each")}
    wide["each"]["config"] = {"num_units": 100}
    for name, stages in (("ten", ten), ("wide", wide)):
        document = {**TOY_RECIPE, "name": name, "custom_stages": stages}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


def _no_op(*needs: str) -> dict[str, Any]:
    return {"class": "stage_noop:NoOp", "needs": list(needs)}


# What a recipe must have; none of it is run.
_TRAIN = {
    "total_images": 32,
    "batch_images": 32,
    "ema_half_life_images": 32,
    "checkpoint_images": 32,
    "log_images": 32,
}
TOY_RECIPE: dict[str, Any] = {
    "data": {"source": "folder", "folder": ".", "list": "captions.csv", "image_px": 16},
    "clip_fit": {},
    "encoders": {"clip_image": {"family": "open_clip_image", "weights": "fitted"}},
    "network": {
        **{"patch_px": 4, "widths": [16], "num_blocks": 1, "cross_attention_px": [4]},
        **{"head_width": 16, "context_width": 16, "embedding_width": 32},
    },
    "base": _TRAIN,
    "experts": {"split": "paper", "train": _TRAIN},
    "sample": {"prompts": ["nothing"], "num_steps": 4},
    "evaluate": {"features": {"kind": "clip"}, "alignment": "shapes"},
}


def _ours(recipe: str, last: str, *more: str, store: str = "store") -> tuple[str, ...]:
    start = ("-m", "pipelines.cli", "--store", f"{store}-{recipe}", "run", f"{recipe}.yaml")
    return (*start, *more, last)


# -- the sides ------------------------------------------------------------------------------------

_PREFECT = {
    "cold": ("prefect_noop.py", "ten", "0"),
    "finished": ("prefect_noop.py", "ten", "0"),
    "changed": ("prefect_noop.py", "ten", "1"),
    "wide": ("prefect_noop.py", "wide", "0"),
}
TOYS = (
    Toy(
        label="ediffi",
        side=OURS,
        files=("stage_noop.py",),
        commands={
            "first": _ours("ten", "third", store="first"),
            "cold": _ours("ten", "third"),
            "finished": _ours("ten", "third"),
            "changed": _ours("ten", "third", "--set", "custom_stages.first.config.setting=1"),
            "wide": _ours("wide", "join"),
        },
        variables={"first": {"EDIFFI_CACHE": "cache"}},
    ),
    Toy(
        label="bare Ray",
        side=RAY,
        files=("ray_noop.py",),
        commands={
            "start": ("ray_noop.py", "start"),
            "cold": ("ray_noop.py", "ten"),
            "wide": ("ray_noop.py", "wide"),
        },
    ),
    Toy(
        label="metaflow",
        side=METAFLOW,
        files=("metaflow_ten.py", "metaflow_wide.py"),
        commands={
            "cold": ("metaflow_ten.py", "--quiet", "run"),
            "finished": ("metaflow_ten.py", "--quiet", "resume"),
            "changed": ("metaflow_ten.py", "--quiet", "resume", "first"),
            "wide": ("metaflow_wide.py", "--quiet", "run"),
        },
    ),
    Toy(label="prefect", side=PREFECT, files=("prefect_noop.py",), commands=_PREFECT),
    Toy(
        label="prefect, server standing",
        side=PREFECT,
        files=("prefect_noop.py",),
        commands=_PREFECT,
        has_server=True,
    ),
    Toy(
        label="dagster, one process",
        side=DAGSTER,
        files=("dagster_noop.py",),
        commands={
            "cold": ("dagster_noop.py", "ten", "all"),
            "finished": ("dagster_noop.py", "ten", "stale"),
            "changed": ("dagster_noop.py", "ten", "stale"),
            "wide": ("dagster_noop.py", "wide", "all"),
        },
        variables={"changed": {"TOY_SETTING": "1"}},
    ),
    Toy(
        label="dagster, a process a step",
        side=DAGSTER,
        files=("dagster_noop.py",),
        commands={
            "cold": (
                "-m",
                "dagster",
                "asset",
                "materialize",
                "-f",
                "dagster_noop.py",
                "--select=*",
            ),
            "wide": ("-m", "dagster", "job", "execute", "-f", "dagster_noop.py", "-j", "wide"),
        },
    ),
)


# -- measuring ------------------------------------------------------------------------------------


def measure(toys: Sequence[Toy], measures: Sequence[str], num_runs: int) -> Seconds:
    """Every measure of every side, in turn, `num_runs` times."""
    found: Seconds = {toy.label: {} for toy in toys}
    with TemporaryDirectory(prefix="ediffi-orchestration-") as scratch, ExitStack() as stack:
        servers: dict[str, Mapping[str, str]] = {}
        for toy in toys:
            toy.side.python()  # installed before anything is timed
            if toy.has_server:
                server = PrefectServer(toy.side, Path(scratch) / "server")
                servers[toy.label] = stack.enter_context(server)
        for run_index in range(num_runs):
            for toy in toys:
                folder = Path(scratch) / f"{run_index}-{toys.index(toy)}"
                toy.prepare(folder)
                for name in ("start", *measures):
                    if name not in toy.commands:
                        continue
                    seconds = toy.measure(name, folder, servers.get(toy.label, {}))
                    found[toy.label].setdefault(name, []).append(seconds)
                    told = f"run {run_index + 1}/{num_runs}: {toy.label}, {name}: {seconds:.2f} s"
                    print(told, file=sys.stderr)
                shutil.rmtree(folder)
    return found


def rows(found: Seconds, versions: Mapping[str, str]) -> list[Row]:
    """Ours beside each side that has the measure, then beside what it may take."""
    ours = found["ediffi"]
    beside: list[tuple[str, list[float], list[float], str]] = [
        (MEASURES[name], ours[name], theirs[name], label)
        for name in MEASURES
        if name in ours
        for label, theirs in found.items()
        if label != "ediffi" and name in theirs
    ]
    if "finished" in ours:
        limit = [FINISHED_LIMIT_S] * len(ours["finished"])
        beside.append((MEASURES["finished"], ours["finished"], limit, "the most it may take"))
    starts = found.get("bare Ray", {}).get("start", [])
    for measure in ("first", "cold"):
        if starts and measure in ours:
            added = [
                max(0.0, one - start) for one, start in zip(ours[measure], starts, strict=True)
            ]
            name = f"{MEASURES[measure]}, beyond Ray's own start"
            beside.append((name, added, [COLD_LIMIT_S] * len(added), "the most it may take"))
    return [
        row(
            f"{name}, whole process" if "beyond" not in name else name,
            "s",
            mine,
            theirs,
            other_name=label,
            better="lower",
            command=COMMAND,
            versions=versions,
        )
        for name, mine, theirs, label in beside
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the rows; `--json` writes them to a file."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="of everything, in turn")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    labels = [toy.label for toy in TOYS if toy.label != "ediffi"]
    parser.add_argument("--sides", nargs="*", choices=labels, default=labels, help="beside ours")
    parser.add_argument("--measures", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    options = parser.parse_args(arguments)
    toys = [toy for toy in TOYS if toy.label in ("ediffi", *options.sides)]
    measures = [name for name in MEASURES if name in options.measures]  # in their order
    found = measure(toys, measures, options.runs)
    peers = {toy.side.package: toy.side.version() for toy in toys}
    write_rows(rows(found, {**peers, **our_versions("ray", "mlflow")}), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
