"""The models of the claims, made by `ediffi run` in one store: what is finished is found again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.claims.data import write_pairs, write_singles

RECIPES = Path(__file__).parent
SEEDS = (0, 1, 2)
_LANES = 2  # trainings at a time, one thread each: the fastest split of two cores
_WHOLE_AXIS = (
    "experts.split=[{name: all, quantiles: [0, 1]}]",
    "experts.train.total_images=32000",  # as many as the three experts have together
)


@dataclass(frozen=True, kw_only=True)
class Models:
    """Ensemble directories, by training seed."""

    experts: tuple[Path, ...]
    continued: tuple[Path, ...]  # one "expert" of the whole noise axis: the base, trained on
    pairs: Path


def make_models(emoji: Path, folder: Path, seeds: Sequence[int] = SEEDS) -> Models:
    """Prepare the data and train what is not yet trained.

    Args:
        emoji: folder with `emoji.parquet` and `images/`.
        folder: of lists, pictures and store; kept, so that a second call goes on.
    """
    singles = _List("singles", folder, write_singles(emoji, folder / "singles"))
    pairs = _List("pairs", folder, write_pairs(emoji, folder / "pairs"))
    for one in (singles, pairs):
        one.run("embed")
    with ThreadPoolExecutor(_LANES) as lanes:
        trained = [lanes.submit(_train_seed, singles, seed) for seed in seeds]
        trained_pairs = lanes.submit(pairs.assemble)
        experts, continued = zip(*(one.result() for one in trained), strict=True)
        return Models(experts=experts, continued=continued, pairs=trained_pairs.result())


@dataclass(frozen=True)
class _List:
    recipe: str
    folder: Path
    path: Path

    def assemble(self, *overrides: str) -> Path:
        """Train base and experts; returns the ensemble directory."""
        return Path(self.run("assemble", *overrides))

    def run(self, stage: str, *overrides: str) -> str:
        """Bring a recipe as far as `stage`; returns the ensemble directory, if there is one yet."""
        settings = [f"data.list={self.path}", "resources.experts.cpus=2", *overrides]
        command = [
            *(str(Path(sys.executable).with_name("ediffi")), "run"),
            *(str(RECIPES / f"{self.recipe}.yaml"), stage),
            *("--store", str(self.folder / "store"), "--json"),
            *(part for setting in settings for part in ("--set", setting)),
        ]
        # One thread a process; not behind everything else that the machine does.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        return str(json.loads(done.stdout)["ensemble"])


def _train_seed(singles: _List, seed: int) -> tuple[Path, Path]:
    seeds = (f"base.seed={seed}", f"experts.train.seed={seed}")
    return singles.assemble(*seeds), singles.assemble(*seeds, *_WHOLE_AXIS)
