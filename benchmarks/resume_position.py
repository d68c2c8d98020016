"""Seconds to the first batch, at the start and deep in an epoch: `-m benchmarks.resume_position`.

A process that has only imported its libraries opens 1,000 shards of 1,000 samples (the same few
tars under many names), holds all files against their records, seeks, and waits for one batch of 64
from two workers. Once from position 0, once from the saved position at 90 % of the twentieth
epoch, in turn. Then the same with 100,000 shards, a hundred million samples.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.interleave import our_versions, row, write_rows
from benchmarks.peers import Peer
from benchmarks.report import Row

COMMAND = "python -m benchmarks.resume_position"
SHARD_SAMPLES = 1_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the rows; `--json` writes them to a file."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run: a smoke test")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args(arguments)
    runs, sizes = (1, (50,)) if options.quick else (options.runs, (1_000, 100_000))
    with TemporaryDirectory(prefix="ediffi-resume-") as folder:
        rows = [_measure(folder, num_shards, runs) for num_shards in sizes]
    write_rows(rows, options.json)
    return 0


def _measure(folder: str, num_shards: int, runs: int) -> Row:
    start_s: list[float] = []
    deep_s: list[float] = []
    deep_position = int(19.9 * num_shards * SHARD_SAMPLES)
    for _ in range(runs):
        for seconds, position in ((start_s, 0), (deep_s, deep_position)):
            # A process of its own: nothing is warm but the page cache.
            with Peer("benchmarks.peers.ours_resume", Path(sys.executable)) as peer:
                peer.ask(action="write", folder=folder, num_shards=num_shards, position=0)
                answer = peer.ask(
                    action="measure", folder=folder, num_shards=num_shards, position=position
                )
            seconds.append(answer["seconds"])
            print(f"{num_shards} shards, at {position}: {answer}", file=sys.stderr)
    return row(
        f"first batch at 90 % of epoch 20, {num_shards:,} shards of {SHARD_SAMPLES:,}",
        "s",
        deep_s,
        start_s,
        other_name="ours, at position 0",
        better="lower",
        command=COMMAND,
        versions=our_versions("torch", "pillow", "numpy"),
    )


if __name__ == "__main__":
    sys.exit(main())
