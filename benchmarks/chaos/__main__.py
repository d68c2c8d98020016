"""Attack whole pipelines until so many kills are done, and compare what comes out.

`python -m benchmarks.chaos [--kills N] [--seed N] [--json FILE] [--work DIR] [--short]`

A pipeline is run once undisturbed. Then the same command runs in other stores: on this machine, on
a cluster of nodes that are lost, on a bucket whose server fails. At moments that the seed draws,
drivers, workers and nodes get SIGKILL and the server has outages; the command is given again until
it succeeds. Every manifest, list of receipts and file must then have the bytes of the undisturbed
run, MLflow may show nothing RUNNING, nothing may be left in flight.

Outcomes are kept in the work directory as they come: the same command goes on from there.
Exit code 1 if anything was not as it should be.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.chaos import attack, audit, outcome
from benchmarks.chaos.attack import Attack
from benchmarks.chaos.outcome import Outcome
from benchmarks.chaos.scene import Scene, short_scene, whole_scene
from benchmarks.interleave import write_rows
from pipelines.store.ledger import Ledger

WORK = Path(".bench/chaos")
SCENERIES = {
    "machine": attack.ON_MACHINE,
    "nodes": attack.ON_NODES,
    "bucket": attack.ON_BUCKET,
}


def undisturbed(scene: Scene, folder: Path) -> dict[str, str]:
    """Digests of a run that nobody disturbs; made once."""
    store = folder / "store"
    if not (folder / "whole").exists():
        shutil.rmtree(folder, ignore_errors=True)
        scene.run(str(store), folder)
        (folder / "whole").touch()
    return audit.digests(Ledger.at(store))


def one_attack(
    scene: Scene,
    calm: dict[str, str],
    place: Path,
    *,
    scenery: str,
    index: int,
    kinds: Sequence[str],
    seed: int,
) -> Outcome:
    """Attack one new store and look at what is left."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    chance = random.Random(seed)
    started = time.monotonic()
    with ExitStack() as stack:
        one = Attack(
            scene=scene, store=str(place / "store"), place=place, kinds=kinds, chance=chance
        )
        if scenery == "nodes":
            from benchmarks.chaos.nodes import ray_nodes

            one.nodes = stack.enter_context(ray_nodes())
        if scenery == "bucket":
            from benchmarks.chaos.bucket import s3_bucket

            one.bucket = stack.enter_context(s3_bucket(chance))
            one.store = f"{one.bucket.url}/store"
        one.run()
        seconds = round(time.monotonic() - started, 1)
        ledger = Ledger.at(one.store)
        begun, units = audit.num_begun(ledger), audit.num_units(ledger)
        return Outcome(
            index=index,
            scenery=scenery,
            kinds=[blow.kind for blow in one.blows],
            codes=one.codes,
            num_files=len(calm),
            num_units=units,
            num_begun=begun,
            num_starting_over=one.num_done_at_ends,
            seconds=seconds,
            problems=[
                *audit.problems(ledger, place, calm),
                *outcome.unexplained(one, begun, units),
            ],
        )


def measure(options: argparse.Namespace) -> list[Outcome]:
    """Attack after attack until there are enough kills; tells of each on stderr."""
    work: Path = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    kept = work / f"outcomes-{options.seed}.jsonl"
    outcomes = outcome.recall(kept)
    make_scene = short_scene if options.short else whole_scene
    with make_scene(work) as scene:
        calm = undisturbed(scene, work / "undisturbed")
        while outcome.num_kills(outcomes) < options.kills:
            index = len(outcomes)
            seed = options.seed * 1_000 + index
            scenery = options.where[index % len(options.where)]
            left = options.kills - outcome.num_kills(outcomes)
            # Outages are no kills: about every second blow on a bucket is one.
            most = min(options.blows, left if scenery != "bucket" else 2 * left)
            chosen = random.Random(seed).choices(SCENERIES[scenery], k=most)
            place = work / f"attack-{options.seed}-{index}"
            found = one_attack(
                scene, calm, place, scenery=scenery, index=index, kinds=chosen, seed=seed
            )
            outcome.remember(kept, found)
            outcomes.append(found)
            words = f"{', '.join(found.kinds)}; {len(found.problems)} problems"
            print(f"attack {index} ({scenery}, {found.seconds:.0f} s): {words}", file=sys.stderr)
            for line in found.problems:
                print(f"  {line}", file=sys.stderr)
            if not found.problems:
                shutil.rmtree(place)
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; write rows with --json, and the table beside them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs in all (50)")
    parser.add_argument("--blows", type=int, default=8, help="of one run to the end, at most (8)")
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments")
    parser.add_argument("--where", nargs="+", choices=SCENERIES, default=list(SCENERIES))
    parser.add_argument("--short", action="store_true", help="the small pipeline of the tests")
    parser.add_argument("--work", type=Path, default=WORK, help=f"stores and outcomes ({WORK})")
    parser.add_argument("--json", type=Path, help="write the rows here, the table beside as .md")
    options = parser.parse_args(arguments)
    # as Ctrl-C: what we have started must end with us
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    outcomes = measure(options)
    text = outcome.table(outcomes)
    command = f"python -m benchmarks.chaos --kills {options.kills} --seed {options.seed}"
    write_rows(outcome.rows(outcomes, command), options.json)
    if options.json is not None:
        options.json.with_suffix(".md").write_text(text)
    print(text, file=sys.stderr)
    return 1 if any(one.problems for one in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
