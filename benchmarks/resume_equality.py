"""Is a resumed training the undisturbed one? `python -m benchmarks.resume_equality [--quick]`.

One small problem, trained by our loop and by the script pattern of diffusers' examples with
accelerate, in four variants (see `benchmarks.peers.accelerate_training`). A run is killed with
SIGKILL after a random step and the same command is given again; the ten steps after the resume are
held against those of a run that nothing disturbed: which pictures were in the batch, and the loss.
Then once more with two processes before the kill and one after it.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.interleave import our_versions, write_rows
from benchmarks.peers import ROOT, PeerError, environment, version_of
from benchmarks.report import Row
from benchmarks.resume_problem import Step, read_diaries, write_pictures

COMMAND = "python -m benchmarks.resume_equality"
REQUIREMENTS = ["accelerate==1.15.0", "torchdata==0.11.0"]
COMPARED_STEPS = 10
KILL_STEPS = range(45, 80)  # after the first checkpoint or the second, in the middle of an epoch


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to train and to resume."""

    name: str
    variant: str = ""  # of accelerate's; empty: ours


OURS = Side(name="ediffi")
OTHERS = (
    Side(name="diffusers' script pattern", variant="script"),
    Side(name="… with skip_first_batches", variant="skip"),
    Side(name="… with skip_first_batches, seedable sampler", variant="seedable"),
    Side(name="… with a stateful DataLoader, seedable sampler", variant="stateful"),
)


@dataclass(frozen=True)
class Difference:
    """Of the steps after a resume from those of the undisturbed run."""

    unequal_steps: int  # steps whose batch holds other pictures
    largest_loss: float  # largest absolute difference of the loss


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the rows; `--json` writes them to a file."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run, one variant: a smoke test")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args(arguments)
    others, runs = (OTHERS[:1], 1) if options.quick else (OTHERS, options.runs)
    kill_steps = random.Random(0).sample(KILL_STEPS, runs)
    print(f"killed after steps {kill_steps}", file=sys.stderr)
    rows: list[Row] = []
    with TemporaryDirectory(prefix="ediffi-equality-") as folder:
        measurement = Measurement(Path(folder))
        for num_ranks in (1,) if options.quick else (1, 2):
            ours = measurement.resume(OURS, kill_steps, num_ranks)
            for side in others:
                theirs = measurement.resume(side, kill_steps, num_ranks)
                rows += _rows(side, num_ranks, ours, theirs, measurement.python)
    write_rows(rows, options.json)
    return 0


class Measurement:
    """Trains in processes of its own; every run has its folder below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.python = environment("accelerate", REQUIREMENTS)
        self._folder = folder
        self._pictures = folder / "pictures"
        self._whole: dict[Side, dict[int, Step]] = {}
        write_pictures(self._pictures)

    def resume(self, side: Side, kill_steps: Sequence[int], num_ranks: int) -> list[Difference]:
        """One difference a kill; `num_ranks` processes are killed, one goes on alone."""
        # The undisturbed run has one process: with two it should be the same training.
        if side not in self._whole:
            self._whole[side] = self._train(side, "whole", num_ranks=1)
        whole = self._whole[side]
        differences = []
        for kill_step in kill_steps:
            run = f"{num_ranks}-ranks-{kill_step}"
            self._train(side, run, num_ranks=num_ranks, kill_step=kill_step)
            resumed = self._train(side, run, num_ranks=1)
            differences.append(difference(whole, resumed))
            place = f"killed after {kill_step}, resumed after {min(resumed) - 1}"
            print(f"{side.name}, {num_ranks} to 1, {place}: {differences[-1]}", file=sys.stderr)
        return differences

    def _train(
        self, side: Side, run: str, *, num_ranks: int, kill_step: int = 0
    ) -> dict[int, Step]:
        """Train as far as `run` goes; return the steps of this attempt."""
        folder = self._folder / (side.variant or "ours") / run
        folder.mkdir(parents=True, exist_ok=True)
        attempt = len(list(folder.glob("diary-*-0.jsonl")))
        diaries = [folder / f"diary-{attempt}-{rank}.jsonl" for rank in range(num_ranks)]
        port = _free_port()
        processes = [
            subprocess.Popen(
                [
                    *self._program(side),
                    *("--pictures", str(self._pictures), "--folder", str(folder)),
                    *("--diary", str(diary), "--kill-step", str(kill_step)),
                ],
                cwd=ROOT,
                env={**os.environ, **_rank_environment(rank, num_ranks, port)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank, diary in enumerate(diaries)
        ]
        try:
            outputs = [process.communicate(timeout=180)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        expected = {-9} if kill_step else {0}
        if {process.returncode for process in processes} != expected:
            raise PeerError(f"{side.name} {run} must end with {expected}:\n{outputs[0][-3000:]}")
        return read_diaries(diaries)

    def _program(self, side: Side) -> list[str]:
        if not side.variant:
            return [sys.executable, "-m", "benchmarks.peers.ours_training"]
        module = "benchmarks.peers.accelerate_training"
        return [str(self.python), "-m", module, "--variant", side.variant]


def difference(whole: dict[int, Step], resumed: dict[int, Step]) -> Difference:
    """Compare the first steps of a resumed run with the same steps of the whole one.

    Raises:
        ValueError: the resumed run has too few steps.
    """
    steps = sorted(resumed)[:COMPARED_STEPS]
    if len(steps) < COMPARED_STEPS:
        raise ValueError(
            f"{COMPARED_STEPS} steps after the resume are compared, only {len(steps)} were trained"
        )
    unequal = sum(whole[step].pictures != resumed[step].pictures for step in steps)
    losses = [abs(whole[step].loss - resumed[step].loss) for step in steps]
    return Difference(unequal, max(losses))


def _rows(
    side: Side, num_ranks: int, ours: list[Difference], theirs: list[Difference], python: Path
) -> list[Row]:
    kind = "killed and resumed" if num_ranks == 1 else f"{num_ranks} processes killed, 1 resumed"
    measures = {
        f"{kind}: batches of other pictures": "unequal_steps",
        f"{kind}: largest difference of the loss": "largest_loss",
    }
    rows = []
    for measure, field in measures.items():
        # Not the medians that other benchmarks tell: equal is zero, and the worst run counts.
        our_worst, their_worst = (max(getattr(one, field) for one in s) for s in (ours, theirs))
        same = our_worst == their_worst
        rows.append(
            Row(
                measure=measure,
                unit=f"of {COMPARED_STEPS} steps" if field == "unequal_steps" else "loss",
                ours=our_worst,
                other=their_worst,
                other_name=side.name,
                ratio=1.0 if same else our_worst / their_worst,
                better="lower",
                spread=0.0,
                runs=len(ours),
                command=COMMAND,
                versions={
                    **our_versions("torch", "deepspeed"),
                    "accelerate": version_of(python, "accelerate"),
                    "torchdata": version_of(python, "torchdata"),
                },
            )
        )
    return rows


def _rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What torch's launcher sets; nothing for a single process."""
    alone = {"OMP_NUM_THREADS": "1"}
    if num_ranks == 1:
        return alone
    return alone | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


if __name__ == "__main__":
    sys.exit(main())
