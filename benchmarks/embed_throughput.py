"""Making embedding caches: `python -m benchmarks.embed_throughput [--quick] [--json FILE]`.

Three encoders (T5, both towers of CLIP) over the same tars, one thread in every encoding process.

- A bare loop: forward passes over the very same batches, tokenized and decoded beforehand. What is
  missing to 1 is what reading, decoding, packing, checking and hashing cost. Where the machine has
  a second core, decoding and packing run beside the encoder; with `--one-core` all share one.
- clip-retrieval, which makes pooled vectors of captions and pictures: against our two CLIP streams,
  of which the text stream also holds all token states. One worker process decodes for it.
- Ray Data's `map_batches`, all three encoders in one actor, with tasks that decode beside it.

Starting processes, importing and loading weights is counted on no side.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.embed_content import Folders, write_all
from benchmarks.interleave import our_versions, row, write_rows
from benchmarks.peers import Peer, environment, version_of
from benchmarks.report import Row

STREAMS = ("t5", "clip_text", "clip_image")
CLIP_RETRIEVAL = "clip-retrieval==2.45.0"
COMMAND = "python -m benchmarks.embed_throughput"


@dataclass
class Seconds:
    """What each run took."""

    ours: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in STREAMS})
    bare: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in STREAMS})
    clip_retrieval: list[float] = field(default_factory=list)
    ray: list[float] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the rows; `--json` writes them to a file."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--quick", action="store_true", help="64 samples, one run: a smoke test")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--samples", type=int, default=384)
    parser.add_argument("--one-core", action="store_true", help="bind all sides to one core")
    options = parser.parse_args(arguments)
    if options.one_core:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    num_samples, runs = (64, 1) if options.quick else (options.samples, options.runs)
    command = COMMAND + " --one-core" * options.one_core
    rows = measure_all(num_samples, runs, command)
    write_rows(rows, options.json)
    return 0


def measure_all(num_samples: int, runs: int, command: str) -> list[Row]:
    """All sides in turn, `runs` times."""
    clip_python = environment("clip-retrieval", ["--no-deps", CLIP_RETRIEVAL])
    seconds = Seconds()
    with TemporaryDirectory(prefix="ediffi-embed-throughput-") as folder, ExitStack() as stack:
        shard_samples = -(-num_samples // 2)
        write_all(Folders(root=Path(folder)), num_samples=num_samples, shard_samples=shard_samples)

        def peer(module: str, python: Path) -> Peer:
            return stack.enter_context(Peer(f"benchmarks.peers.{module}", python))

        ours = peer("ours_embed", Path(sys.executable))
        clip = peer("clip_retrieval_embed", clip_python)
        ray = peer("ray_embed", Path(sys.executable))
        for run_index in range(-1, runs):  # the first one warms up
            taken = _one_run(folder, ours, clip, ray, ours_first=run_index % 2 == 0)
            if run_index >= 0:
                _add(seconds, taken)
                _narrate(taken, num_samples)
    return _rows(seconds, num_samples, command, version_of(clip_python, "clip-retrieval"))


def _one_run(folder: str, ours: Peer, clip: Peer, ray: Peer, *, ours_first: bool) -> Seconds:
    """Every side once; `ours` and `bare` of one encoder lie side by side."""
    taken = Seconds()
    for stream in STREAMS:
        for action in ("ours", "bare") if ours_first else ("bare", "ours"):
            answer = ours.ask(action=action, folder=folder, stream=stream)
            getattr(taken, action)[stream].append(answer["seconds"])
    taken.clip_retrieval.append(clip.ask(folder=folder, num_prepro_workers=1)["seconds"])
    taken.ray.append(ray.ask(folder=folder)["seconds"])
    return taken


def _add(seconds: Seconds, taken: Seconds) -> None:
    for stream in STREAMS:
        seconds.ours[stream] += taken.ours[stream]
        seconds.bare[stream] += taken.bare[stream]
    seconds.clip_retrieval += taken.clip_retrieval
    seconds.ray += taken.ray


def _rows(seconds: Seconds, num_samples: int, command: str, clip_version: str) -> list[Row]:
    def rates(per_stream: dict[str, list[float]], streams: Sequence[str]) -> list[float]:
        return [num_samples / sum(times) for times in zip(*(per_stream[name] for name in streams))]

    def compare(
        measure: str, streams: Sequence[str], other: list[float], other_name: str, **versions: str
    ) -> Row:
        return row(
            measure,
            "samples/s",
            rates(seconds.ours, streams),
            other,
            other_name=other_name,
            better="higher",
            command=command,
            versions={**our_versions("torch", "transformers", "open_clip_torch"), **versions},
        )

    clip_rates = [num_samples / taken for taken in seconds.clip_retrieval]
    ray_rates = [num_samples / taken for taken in seconds.ray]
    ray_version = our_versions("ray")["ray"]
    return [
        compare("three encoders", STREAMS, rates(seconds.bare, STREAMS), "bare forward loop"),
        *(
            compare(name, [name], rates(seconds.bare, [name]), "bare forward loop")
            for name in STREAMS
        ),
        compare(
            "CLIP text and image",
            STREAMS[1:],
            clip_rates,
            "clip-retrieval",
            **{"clip-retrieval": clip_version},
        ),
        compare("three encoders", STREAMS, ray_rates, "ray.data map_batches", ray=ray_version),
    ]


def _narrate(taken: Seconds, num_samples: int) -> None:
    for stream in STREAMS:
        ours, bare = taken.ours[stream][0], taken.bare[stream][0]
        print(f"{stream:10} ours {ours:7.2f} s  bare {bare:7.2f} s", file=sys.stderr)
    print(
        f"clip-retrieval {taken.clip_retrieval[0]:7.2f} s, ray {taken.ray[0]:7.2f} s, "
        f"{num_samples} samples",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
