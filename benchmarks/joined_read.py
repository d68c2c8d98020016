"""Reading pictures joined with three caches: `python -m benchmarks.joined_read [--quick]`.

Samples per second of one epoch, shuffled, as collated batches of 64, from the page cache, by every
side from its own format: the same content, checked bit by bit before anything is timed. The epoch
is timed whole, with the start of the workers. Ray Data has no shuffling here, to its advantage,
and its two CPUs are compared with our two workers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.interleave import our_versions, row, write_rows
from benchmarks.peers import Peer, environment, version_of
from benchmarks.report import Row

SEED = 1


@dataclass(frozen=True, kw_only=True)
class Side:
    """One reader and where its data lies."""

    name: str  # the package
    module: str
    requirement: str  # "": as it is in our own environment
    folder: str  # of its data, below the benchmark's
    num_workers: tuple[int, ...] = (0, 2)


OURS = Side(name="ediffi", module="ours_read", requirement="", folder="tars")
PEERS = (
    Side(name="webdataset", module="webdataset_read", requirement="", folder="tars"),
    Side(
        name="mosaicml-streaming",
        module="streaming_read",
        requirement="mosaicml-streaming==0.13.0",
        folder="mds",
    ),
    Side(name="litdata", module="litdata_read", requirement="litdata==0.2.76", folder="litdata"),
    Side(name="ray", module="ray_read", requirement="", folder="tars", num_workers=(2,)),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the rows; `--json` writes them to a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.joined_read", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="800 samples, one run: a smoke test")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args(arguments)
    num_samples, runs = (800, 1) if options.quick else (8000, options.runs)
    rows = measure_all(num_samples, runs)
    write_rows(rows, options.json)
    return 0


def measure_all(num_samples: int, runs: int) -> list[Row]:
    """One row for every peer and number of workers."""
    sides = (OURS, *PEERS)
    pythons = {side.name: _python(side) for side in sides}
    rates: dict[tuple[str, int], list[float]] = {}
    with TemporaryDirectory(prefix="ediffi-joined-read-") as folder, ExitStack() as stack:
        asks: dict[str, Any] = {}
        for side in sides:
            module, python = f"benchmarks.peers.{side.module}", pythons[side.name]
            about = {"folder": f"{folder}/{side.folder}", "num_samples": num_samples}
            with Peer(module, python) as writer:  # writing leaves traces: litdata's makes workers
                writer.ask(action="write", num_workers=0, **about)  # start slowly ever after
            asks[side.name] = (stack.enter_context(Peer(module, python)), about)
        _check_equal(sides, asks)
        for run_index in range(runs):
            for num_workers in (0, 2):
                turn = [side for side in sides if num_workers in side.num_workers]
                for side in turn if run_index % 2 else reversed(turn):
                    peer, about = asks[side.name]
                    answer = peer.ask(action="measure", num_workers=num_workers, **about)
                    key = (side.name, num_workers)
                    rates.setdefault(key, []).append(answer["samples_per_s"])
                    _narrate(side, num_workers, answer["samples_per_s"])
    return [
        row(
            f"joined read, {num_workers} workers",
            "samples/s",
            rates[OURS.name, num_workers],
            rates[side.name, num_workers],
            other_name=side.name if side.name != "webdataset" else "webdataset add_column",
            better="higher",
            command="python -m benchmarks.joined_read",
            versions={
                **our_versions("torch", "pillow", "numpy"),
                side.name: version_of(pythons[side.name], side.name),
            },
        )
        for side in PEERS
        for num_workers in side.num_workers
    ]


def _python(side: Side) -> Path:
    if not side.requirement:
        return Path(sys.executable)
    return environment(side.name, [side.requirement])


def _check_equal(sides: Sequence[Side], asks: dict[str, Any]) -> None:
    """Every side must give back the same samples. Raises ValueError naming one that does not."""
    digests = {}
    for side in sides:
        peer, about = asks[side.name]
        digests[side.name] = peer.ask(action="check", num_workers=side.num_workers[0], **about)
    for name, found in digests.items():
        if found != digests[OURS.name]:
            raise ValueError(f"{name} read {found}, we read {digests[OURS.name]}: not comparable")


def _narrate(side: Side, num_workers: int, samples_per_s: float) -> None:
    print(f"{side.name:20} {num_workers} workers {samples_per_s:8.0f} samples/s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
