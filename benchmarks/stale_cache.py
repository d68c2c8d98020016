"""The truth table of stale caches: what is done again after an edit, and whether that was right.

`python -m benchmarks.stale_cache [--quick] [--json FILE] [--sides NAME...]`

A toy of three steps (`read` a shard, `helped` by a function of another module and a setting,
`scaled` by a closure) is run once on each side. Then, one edit at a time and each from the finished
state, it is run again by the command that the side has for that. Every step writes a line when it
is really done, and the number that comes out is compared with the right one:

- a wrong number is a *wrong hit*: something old was taken for new;
- a right number, for which a step was done that the edit cannot change, is a *needless miss*.

Ours runs a recipe with three custom stages over ready shards through `ediffi run`. Prefect runs
with INPUTS + TASK_SOURCE, its strictest cache; Dagster makes what it calls stale, with the shard
an observed source; Metaflow has `resume`, which takes over whatever succeeded, and `run`, which
keeps nothing. With --json the table is written beside the file, as Markdown.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from benchmarks.interleave import our_versions, write_rows
from benchmarks.orchestration import TOY_RECIPE
from benchmarks.peers.orchestrators import (
    DAGSTER,
    FILES,
    LOG,
    METAFLOW,
    OURS,
    OUTPUT,
    PREFECT,
    Orchestrator,
    done,
)
from benchmarks.peers.prefect_server import PrefectServer
from benchmarks.report import Row
from benchmarks.stale_edits import CAPTION, EDITS, STEPS, Edit, Verdict, Wording, judge, write_shard

COMMAND = "python -m benchmarks.stale_cache"
Table = dict[str, dict[str, Verdict]]  # edit -> side -> verdict


# -- the sides ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Toy:
    """The toy on one side.

    Args:
        files: of benchmarks/peers/toys, in the folder besides what all sides have.
        first: commands of its interpreter that run it the first time, one after another.
        again: commands after an edit; the last line that the last one prints is the number, or
            JSON that says where it lies.
        wording: how it writes what is edited, where that differs from side to side.
    """

    label: str
    side: Orchestrator
    files: tuple[str, ...]
    first: tuple[tuple[str, ...], ...]
    again: tuple[tuple[str, ...], ...]
    wording: Wording

    def prepare(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        for name in ("toy.py", "reading.py", "helping.py", *self.files):
            shutil.copy(FILES / name, folder / name)
        write_shard(folder / "input.tar", CAPTION)
        write_shard(folder / "held-out.tar", CAPTION, key="held_out")
        (folder / "settings.json").write_text(json.dumps({"add": 10}))
        if self.side is OURS:
            (folder / "settings.json").unlink()  # the recipe says it
            (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(), sort_keys=False))

    def run(
        self, folder: Path, commands: Sequence[Sequence[str]], server: Mapping[str, str]
    ) -> int:
        """Run the commands; returns the number that came out."""
        # files are edited within the second in which they were compiled
        more = {**server, "PYTHONDONTWRITEBYTECODE": "1"}
        for words in commands:
            self.side.run(folder, *words, more=more)
        last = (folder / OUTPUT).read_text().splitlines()[-1]
        if self.side is not OURS:
            return int(last)
        stages = {one["name"]: one for one in json.loads(last)["stages"]}
        if stages["ingest"]["state"] == "ran":  # a step of ours that writes no line
            with (folder / LOG).open("a") as log:
                log.write("read\n")
        return int((Path(stages["scaled"]["path"]) / "number.txt").read_text())


def recipe() -> dict[str, object]:
    """Ours: three custom stages over ready shards."""
    stages = {
        "read": {"class": "stage_read:Read", "needs": ["ingest"]},
        "helped": {"class": "stage_helped:Helped", "needs": ["read"], "config": {"add": 10}},
        "scaled": {"class": "stage_scaled:Scaled", "needs": ["helped"]},
    }
    data = {"source": "shards", "train": "input.tar", "held_out": "held-out.tar", "image_px": 16}
    resources = {"helped": {"cpus": 1}}
    own = {"name": "stale", "data": data, "custom_stages": stages, "resources": resources}
    return {**TOY_RECIPE, **own}


_RUN = ("-m", "pipelines.cli", "--store", "store", "run", "recipe.yaml", "scaled", "--json")
_TELL = ("metaflow_stale.py", "tell")
TOYS = (
    Toy(
        label="ediffi",
        side=OURS,
        files=("stage_read.py", "stage_helped.py", "stage_scaled.py"),
        first=(_RUN,),
        again=(_RUN,),
        wording=Wording(setting=("add: 10", "add: 20"), resources=("cpus: 1", "cpus: 0.5")),
    ),
    *(
        Toy(
            label=label,
            side=PREFECT,
            files=("prefect_stale.py",),
            first=(command,),
            again=(command,),
            wording=Wording(resources=("cpus-1", "cpus-2")),
        )
        for label, command in (
            ("prefect", ("prefect_stale.py",)),
            ("prefect, given the digest", ("prefect_stale.py", "digest")),
        )
    ),
    Toy(
        label="dagster",
        side=DAGSTER,
        files=("dagster_stale.py",),
        first=(("dagster_stale.py",),),
        again=(("dagster_stale.py",),),
        wording=Wording(resources=('"cpus": "1"', '"cpus": "2"')),
    ),
    *(
        Toy(
            label=f"metaflow {verb}",
            side=METAFLOW,
            files=("metaflow_stale.py",),
            first=(("metaflow_stale.py", "--quiet", "run"), _TELL),
            again=(("metaflow_stale.py", "--quiet", verb), _TELL),
            wording=Wording(resources=("cpu=1", "cpu=2")),
        )
        for verb in ("resume", "run")
    ),
)


# -- measuring ------------------------------------------------------------------------------------


def measure(toys: Sequence[Toy], edits: Sequence[Edit]) -> Table:
    """Every edit on every side."""
    table: Table = {edit.name: {} for edit in edits}
    for toy in toys:
        with TemporaryDirectory(prefix="ediffi-stale-") as scratch, ExitStack() as stack:
            folder, server = Path(scratch) / "toy", dict[str, str]()
            toy.prepare(folder)
            if toy.side is PREFECT:
                server |= stack.enter_context(PrefectServer(toy.side, Path(scratch) / "server"))
            number = toy.run(folder, toy.first, server)
            if number != EDITS[0].right or set(steps := done(folder)) != STEPS:
                raise RuntimeError(f"{toy.label}: the first run made {number} by {steps}")
            finished = folder.with_name("finished")
            shutil.copytree(folder, finished, symlinks=True)
            for edit in edits:
                shutil.rmtree(folder)
                shutil.copytree(finished, folder, symlinks=True)
                edit.make(folder, toy.wording)
                number = toy.run(folder, toy.again, server)
                verdict = judge(edit, number, steps := done(folder))
                table[edit.name][toy.label] = verdict
                told = f"{toy.label}: {edit.name}: {verdict} ({', '.join(steps) or 'none done'})"
                print(told, file=sys.stderr)
    return table


_WORDS = """\
Three steps, finished once; then one edit at a time, each from the finished state, and the side's
own command again. *Wrong hit*: the number that came out is not the right one. *Needless miss*: it
is, but a step was done again that the edit cannot change. Prefect caches by INPUTS + TASK_SOURCE,
once with the shard's path alone and once with the digest of its bytes among the inputs;
Dagster makes what it calls stale, the shard being an observed source with the digest of its
bytes, and code versions being what nobody remembered to raise; Metaflow has no cache: `resume`
takes over whatever succeeded, `run` does all of it. Ours tells code apart by a step's module and
all that it imports from beside it, and a shard on a file system by its size and time; listing the
shard again, a stage of ours before `read`, is counted as `read`.
"""


def markdown(table: Table) -> str:
    """The table for people."""
    labels = list(next(iter(table.values())))
    lines = [
        "| edited | " + " | ".join(labels) + " |",
        "|---|" + "---|" * len(labels),
        *(
            f"| {name} | " + " | ".join(row[one] for one in labels) + " |"
            for name, row in table.items()
        ),
    ]
    for verdict, plural in (("wrong hit", "wrong hits"), ("needless miss", "needless misses")):
        counts = [sum(row[one] == verdict for row in table.values()) for one in labels]
        lines.append(f"| **{plural}** | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines) + "\n"


def rows(table: Table, versions: Mapping[str, str]) -> list[Row]:
    """How many edits each side answered rightly, ours beside it."""
    labels = list(next(iter(table.values())))
    right = {one: sum(row[one] == "right" for row in table.values()) for one in labels}
    return [
        Row(
            measure=f"edits answered rightly, of {len(table)}",
            unit="edits",
            ours=right["ediffi"],
            other=right[label],
            other_name=label,
            ratio=right["ediffi"] / right[label],
            better="higher",
            spread=0.0,
            runs=1,
            command=COMMAND,
            versions=versions,
        )
        for label in labels
        if label != "ediffi" and right[label]
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table and the rows; `--json` writes both."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the first three edits only")
    parser.add_argument("--json", type=Path, help="write the rows here, the table beside them")
    labels = [toy.label for toy in TOYS if toy.label != "ediffi"]
    parser.add_argument("--sides", nargs="*", choices=labels, default=labels, help="beside ours")
    options = parser.parse_args(arguments)
    toys = [toy for toy in TOYS if toy.label in ("ediffi", *options.sides)]
    table = measure(toys, EDITS[:3] if options.quick else EDITS)
    print(markdown(table), file=sys.stderr)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        page = options.json.with_suffix(".md")
        page.write_text(f"{_WORDS}\n{markdown(table)}", encoding="utf-8")
    peers = {toy.side.package: toy.side.version() for toy in toys}
    write_rows(rows(table, {**peers, **our_versions("ray")}), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
