"""The command line. stdout is data, stderr is narration; exit codes are in `pipelines.errors`."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pipelines import commands
from pipelines.errors import RetryableError, StageFailed, UserError
from pipelines.ledger import Ledger
from pipelines.recipe_file import load_recipe

STORE = "ediffi-store"


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
    """Options of the command; stages may also stand after options, as in `run R --json ingest`.

    argparse alone gives up on a list of positionals that an option interrupts.
    """
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "stages") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.stages += rest
    return options


class _Parser(argparse.ArgumentParser):
    """Names the likely command after a misspelt one."""

    def error(self, message: str) -> None:  # type: ignore[override]
        wrong = re.search(r"argument COMMAND: invalid choice: '(.*?)'", message)
        close = difflib.get_close_matches(wrong[1], COMMANDS, n=1) if wrong else []
        hint = f"; did you mean {close[0]!r}?" if close else ""
        self.exit(2, f"{self.prog}: {message}{hint}\n")


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = _Parser(prog="ediffi", description="Train text-to-image models as ensembles.")
    parser.add_argument("--store", type=str, default=STORE, help=f"store directory ({STORE})")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    for name, (function, help_text, add_options) in COMMANDS.items():
        verb = verbs.add_parser(name, help=help_text, description=help_text)
        verb.add_argument("--store", type=str, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        add_options(verb)
        verb.set_defaults(command=function)
    return parser


def _recipe_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", help="a YAML file, or the name of a recipe of the package")
    verb.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="change one field of the recipe; may be given several times",
    )
    verb.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def _run_options(verb: argparse.ArgumentParser) -> None:
    _recipe_options(verb)
    verb.add_argument("stages", nargs="*", help="only these stages and what they need")


def _demo_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def _status_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run", nargs="?", default="", help="id of a run, or its beginning; newest")
    verb.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def _sample_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", type=Path, help="an ensemble directory")
    verb.add_argument("--prompt", action="append", required=True, help="what to draw; repeatable")
    verb.add_argument("--seed", type=int, action="append", help="one a picture (0 1 2 3)")
    verb.add_argument("--guidance", type=float, default=2.0)
    verb.add_argument("--steps", type=int, default=18)
    verb.add_argument("--sampler", choices=("heun", "dpm++2m"), default="heun")
    verb.add_argument("--sigma-max", type=float, default=80.0)
    verb.add_argument("--device", default="cpu", help="cpu or cuda")
    verb.add_argument("--use", choices=("ensemble", "base"), default="ensemble")
    verb.add_argument("--out", type=Path, default=Path("samples"), help="directory for the PNGs")


def _compare_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("runs", nargs="+", help="ids of runs, or their beginnings")
    verb.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def _cache_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("action", choices=("ls", "verify"))
    verb.add_argument("stage", nargs="?", default="*", help="a stage such as embed/t5; all")
    verb.add_argument("--json", action="store_true", help="print JSON on stdout")


def _encoders_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("action", choices=("fit",))
    _recipe_options(verb)


def _doctor_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", nargs="?", default="", help="also check what this recipe needs")
    verb.add_argument("--json", action="store_true", help="print JSON on stdout")


def doctor(options: argparse.Namespace) -> int:
    """Ask the machine whether a run would work; exit code 1 if something is wrong."""
    from cluster.doctor import Needs, examine
    from pipelines.tracking import default_uri

    store = Ledger.at(options.store).store
    weights = {}
    if options.recipe:
        encoders = load_recipe(options.recipe).encoders
        weights = {
            name: one.weights
            for name, one in encoders.items()
            # open_clip alone knows where it keeps the weights that its tags name
            if one.family == "transformers" or "/" in one.weights
        }
    needs = Needs(
        store_path=store,
        lock_path=Path(__file__).parents[1] / "requirements.lock",
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or default_uri(store),
        weights=weights,
    )
    findings = examine(needs)
    for finding in findings:
        if options.json:
            print(json.dumps(asdict(finding)))
            continue
        print(f"{'ok  ' if finding.ok else 'BAD '} {finding.name:<16} {finding.found}")
        if not finding.ok:
            print(f"     {'':<16} -> {finding.remedy}")
    return 0 if all(finding.ok for finding in findings) else 1


COMMANDS = {
    "demo": (commands.demo, "the whole pipeline on the embedded data set", _demo_options),
    "plan": (commands.plan, "stages, hit or miss, and why", _recipe_options),
    "run": (commands.run, "run a recipe; run it again to go on", _run_options),
    "status": (commands.status, "what a run did and what is under way", _status_options),
    "sample": (commands.sample, "draw pictures with an ensemble", _sample_options),
    "compare": (commands.compare, "settings and figures of runs, side by side", _compare_options),
    "cache": (commands.cache, "list or verify what the store holds", _cache_options),
    "encoders": (commands.encoders, "fit a CLIP on a recipe's own pictures", _encoders_options),
    "doctor": (doctor, "is this machine ready?", _doctor_options),
}


if __name__ == "__main__":
    sys.exit(main())
