"""The command line. stdout is data, stderr is narration; exit codes are in `pipelines.errors`."""

from __future__ import annotations

import argparse
import atexit
import difflib
import gc
import os
import re
import sys
from collections.abc import Sequence

from pipelines.commands import ema, sample
from pipelines.commands import options as options_of
from pipelines.commands import run as commands
from pipelines.commands.cost import cost_options
from pipelines.commands.doctor import doctor_options
from pipelines.commands.options import STORE, late
from pipelines.commands.store_outages import from_store
from pipelines.errors import RetryableError, StageFailed, UserError
from pipelines.jobs.job_start import prepared

_LISTS = ("stages", "shards")  # positional arguments of which there may be any number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    _spare_collections()
    options = parse(arguments)
    try:
        return int(options.command(options) or 0)
    except (UserError, RetryableError, StageFailed) as error:
        from pipelines.masking import mask

        print(f"ediffi: {mask(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("ediffi: stopped; run the same command to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `ediffi cache ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _spare_collections() -> None:
    """Nearly all that imports make stays until the end: looking for what does not takes a second.

    At the end the system frees it all at once.
    """
    gc.set_threshold(50_000, 20, 50)
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)


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


COMMANDS: dict[str, tuple[options_of.Command, str, options_of.AddOptions]] = {
    "demo": (
        from_store(commands.demo),
        "the whole pipeline on the embedded data set",
        options_of.json_option,
    ),
    "plan": (
        from_store(late("plan", "plan")),
        "stages, hit or miss and why, and what they would take",
        options_of.plan_options,
    ),
    "network": (
        from_store(late("network", "network")),
        "parameters of every network of a recipe, part by part, beside the paper's",
        options_of.recipe_options,
    ),
    "run": (
        prepared(commands.run),
        "run a recipe; run it again to go on",
        options_of.run_options,
    ),
    "submit": (
        late("submit", "submit"),
        "run a recipe on a cluster",
        options_of.submit_options,
    ),
    "embed": (
        from_store(late("embed", "embed")),
        "embedding caches of shards, without a recipe for training",
        options_of.embed_options,
    ),
    "status": (
        from_store(late("jobs", "status")),
        "what a job or run did and what is under way",
        options_of.status_options,
    ),
    "logs": (
        from_store(late("jobs", "logs")),
        "what the driver of a job said, or units of a run",
        options_of.logs_options,
    ),
    "cancel": (
        from_store(late("jobs", "cancel")),
        "ask a job or run to save and end",
        options_of.cancel_options,
    ),
    "list": (
        from_store(late("jobs", "list_all")),
        "jobs and runs of the store",
        options_of.list_options,
    ),
    "cost": (
        from_store(late("cost", "cost")),
        "what a run took, and what the store saved it",
        cost_options,
    ),
    "sample": (sample.sample, "draw pictures with an ensemble", sample.sample_options),
    "compare": (
        from_store(commands.compare),
        "settings and figures of runs, side by side",
        options_of.compare_options,
    ),
    "ema": (ema.ema, "another width of average of a snapshot", ema.ema_options),
    "cache": (
        from_store(options_of.cache),
        "operate what the store holds",
        options_of.cache_options,
    ),
    "encoders": (
        commands.encoders,
        "fit a CLIP on a recipe's own pictures",
        options_of.encoders_options,
    ),
    "doctor": (late("doctor", "doctor"), "is this machine ready?", doctor_options),
}


if __name__ == "__main__":
    sys.exit(main())
