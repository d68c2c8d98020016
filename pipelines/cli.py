"""The command line. stdout is data, stderr is narration; exit codes are in `pipelines.errors`."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.commands import ema, sample
from pipelines.commands import options as options_of
from pipelines.commands import run as commands
from pipelines.commands.options import late
from pipelines.errors import RetryableError, StageFailed, UserError
from pipelines.ledger import Ledger
from pipelines.recipe_file import load_any_recipe

if TYPE_CHECKING:
    from cluster.doctor import Finding

STORE = "ediffi-store"
_LISTS = ("stages", "shards")  # positional arguments of which there may be any number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = parse(arguments)
    try:
        return int(options.command(options) or 0)
    except (UserError, RetryableError, StageFailed) as error:
        print(f"ediffi: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("ediffi: stopped; run the same command to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `ediffi cache ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command; lists may also stand after options, as in `run R --json ingest`.

    argparse alone gives up on a list of positionals that an option interrupts.
    """
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    words = next((getattr(options, name) for name in _LISTS if hasattr(options, name)), None)
    if rest and (words is None or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if words is not None:
        words += rest
    return options


class _Parser(argparse.ArgumentParser):
    """Names the likely command after a misspelt one."""

    def error(self, message: str) -> None:  # type: ignore[override]
        wrong = re.search(r"argument (COMMAND|ACTION): invalid choice: '(.*?)'", message)
        known = {"COMMAND": list(COMMANDS), "ACTION": list(options_of.CACHE_ACTIONS)}
        close = difflib.get_close_matches(wrong[2], known[wrong[1]], n=1) if wrong else []
        hint = f"; did you mean {close[0]!r}?" if close else ""
        self.exit(2, f"{self.prog}: {message}{hint}\n")


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = _Parser(prog="ediffi", description="Train text-to-image models as ensembles.")
    parser.add_argument("--store", type=str, default=STORE, help=f"directory or URL ({STORE})")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    for name, (function, help_text, add_options) in COMMANDS.items():
        verb = verbs.add_parser(name, help=help_text, description=help_text)
        verb.add_argument("--store", type=str, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        add_options(verb)
        verb.set_defaults(command=function)
    return parser


def doctor(options: argparse.Namespace) -> int:
    """Ask the machine whether a run would work; exit code 1 if something is wrong."""
    from cluster.doctor import Needs, examine
    from pipelines.tracking import default_uri

    store = Ledger.at(options.store).store
    weights = {}
    if options.recipe:
        encoders = load_any_recipe(options.recipe).encoders
        weights = {
            name: one.weights
            for name, one in encoders.items()
            # open_clip alone knows where it keeps the weights that its tags name
            if one.family == "transformers" or "/" in one.weights
        }
    needs = Needs(
        # beside an object store, work in flight needs room in the directory for temporary files
        store_path=store if isinstance(store, Path) else Path(tempfile.gettempdir()),
        lock_path=Path(__file__).parents[1] / "requirements.lock",
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or default_uri(store),
        weights=weights,
    )
    findings = examine(needs)
    if not isinstance(store, Path):
        findings = [one for one in findings if one.name != "store"] + [_object_store(options.store)]
    for finding in findings:
        if options.json:
            print(json.dumps(asdict(finding)))
            continue
        print(f"{'ok  ' if finding.ok else 'BAD '} {finding.name:<16} {finding.found}")
        if not finding.ok:
            print(f"     {'':<16} -> {finding.remedy}")
    return 0 if all(finding.ok for finding in findings) else 1


def _object_store(store: str) -> Finding:
    """Can the bucket be reached and written?"""
    from cluster.doctor import Finding

    try:
        Ledger.open(store)
    except UserError as error:
        remedy = "check the URL, AWS_ENDPOINT_URL and the credentials in the environment"
        return Finding(name="store", ok=False, found=str(error), remedy=remedy)
    return Finding(name="store", ok=True, found=f"{store} can be written")


COMMANDS: dict[str, tuple[options_of.Command, str, options_of.AddOptions]] = {
    "demo": (
        commands.demo,
        "the whole pipeline on the embedded data set",
        options_of.json_option,
    ),
    "plan": (
        late("plan", "plan"),
        "stages, hit or miss and why, and what they would take",
        options_of.plan_options,
    ),
    "network": (
        late("network", "network"),
        "parameters of every network of a recipe, part by part, beside the paper's",
        options_of.recipe_options,
    ),
    "run": (commands.run, "run a recipe; run it again to go on", options_of.run_options),
    "embed": (
        late("embed", "embed"),
        "embedding caches of shards, without a recipe for training",
        options_of.embed_options,
    ),
    "status": (
        commands.status,
        "what a run did and what is under way",
        options_of.status_options,
    ),
    "sample": (sample.sample, "draw pictures with an ensemble", sample.sample_options),
    "compare": (
        commands.compare,
        "settings and figures of runs, side by side",
        options_of.compare_options,
    ),
    "ema": (ema.ema, "another width of average of a snapshot", ema.ema_options),
    "cache": (options_of.cache, "operate what the store holds", options_of.cache_options),
    "encoders": (
        commands.encoders,
        "fit a CLIP on a recipe's own pictures",
        options_of.encoders_options,
    ),
    "doctor": (doctor, "is this machine ready?", options_of.doctor_options),
}


if __name__ == "__main__":
    sys.exit(main())
