"""Which arguments and options each command of the command line takes."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser
from collections.abc import Callable
from importlib import import_module

STORE = "ediffi-store"  # unless --store, or a profile, names another
JSON_HELP = "print JSON on stdout"
_NAMED = "id of a job or a run, or its beginning"
Command = Callable[[argparse.Namespace], int | None]


def late(module: str, name: str) -> Command:
    """A command whose module is imported when it is called: the others start without it."""

    def command(options: argparse.Namespace) -> int | None:
        function: Command = getattr(import_module(f"pipelines.commands.{module}"), name)
        return function(options)

    return command


def count(text: str) -> int:
    """A number of things, as an option takes it."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number such as 200, got {text!r}")
    return int(text)


def set_option(verb: ArgumentParser) -> None:
    """`--set`, for every command that takes a recipe."""
    verb.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="change one field of the recipe; may be given several times",
    )


def json_option(verb: ArgumentParser) -> None:
    """`--json`, for programs."""
    verb.add_argument("--json", action="store_true", help=JSON_HELP)


def recipe_options(verb: ArgumentParser) -> None:
    """A recipe, changes to it, and `--json`."""
    verb.add_argument("recipe", help="a YAML file, or the name of a recipe of the package")
    set_option(verb)
    json_option(verb)


def plan_options(verb: ArgumentParser) -> None:
    recipe_options(verb)
    verb.add_argument(
        "--probe",
        type=count,
        default=0,
        metavar="N",
        help="encode N samples of the recipe's own data on this machine, and predict from that",
    )
    from pipelines.commands.prices import price_options

    price_options(verb)


def run_options(verb: ArgumentParser) -> None:
    recipe_options(verb)
    verb.add_argument("stages", nargs="*", help="only these stages and what they need")
    verb.add_argument(
        "--leave",
        action="store_true",
        help="end with code 3 if another run works on one of the stages, instead of waiting for it",
    )
    verb.add_argument(
        "--expect-environment",
        default="",
        metavar="DIGEST",
        help="refuse to start unless the packages are those of the requirements.lock beside the "
        "recipe, and that is its digest; `submit` says so",
    )
    verb.add_argument(
        "--require-environment",
        action="append",
        default=[],
        metavar="NAME",
        help="refuse to start unless this variable is set here; `submit` to a Ray cluster says so "
        "of what the profile passes on; may be given several times",
    )


def embed_options(verb: ArgumentParser) -> None:
    verb.add_argument("shards", nargs="*", metavar="SHARDS", help="pattern of tars, path or URL")
    verb.add_argument(
        "--encoder",
        dest="encoders",
        action="append",
        default=[],
        metavar="NAME=FAMILY:WEIGHTS[,FIELD=VALUE...]",
        help="such as t5=transformers:google/t5-v1_1-xxl,max_tokens=113; may be given several "
        "times; the fields are those of a recipe's encoder",
    )
    verb.add_argument("--recipe", default="", help="a YAML file with data and encoders instead")
    verb.add_argument("--cpus", type=float, default=1.0, help="of one worker (1)")
    verb.add_argument("--gpus", type=float, default=0.0, help="of one worker, or a fraction (0)")
    verb.add_argument(
        "--max-rejects-fraction",
        type=float,
        metavar="FRACTION",
        help="of samples that may be refused, in ingest and by each encoder",
    )
    verb.add_argument("--name", default="embed", help="what the run is called (embed)")
    set_option(verb)
    json_option(verb)


def submit_options(verb: ArgumentParser) -> None:
    recipe_options(verb)
    verb.add_argument("stages", nargs="*", help="only these stages and what they need")
    verb.add_argument(
        "--cluster",
        required=True,
        metavar="PROFILE",
        help="where: a profile's name, or the path of its YAML file",
    )
    verb.add_argument(
        "--dry-run", action="store_true", help="print what would be sent, and do nothing"
    )


def status_options(verb: ArgumentParser) -> None:
    verb.add_argument("name", nargs="?", default="", help=f"{_NAMED}; the newest run")
    json_option(verb)


def logs_options(verb: ArgumentParser) -> None:
    verb.add_argument("name", nargs="?", default="", help=f"{_NAMED}; the newest run")
    verb.add_argument("--follow", action="store_true", help="go on until it is over")
    verb.add_argument(
        "--unit",
        default="",
        metavar="STAGE[/UNIT]",
        help="what units of a stage said instead, such as embed/t5/train-00000",
    )


def cancel_options(verb: ArgumentParser) -> None:
    verb.add_argument("name", help=_NAMED)


def list_options(verb: ArgumentParser) -> None:
    json_option(verb)


def compare_options(verb: ArgumentParser) -> None:
    verb.add_argument("runs", nargs="+", help="ids of runs, or their beginnings")
    json_option(verb)


def encoders_options(verb: ArgumentParser) -> None:
    verb.add_argument("action", choices=("fit",))
    recipe_options(verb)


# -- the actions of `ediffi cache` ----------------------------------------------------------------


def cache_options(verb: ArgumentParser) -> None:
    """A parser for each action."""
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, (_, help_text, add_options) in CACHE_ACTIONS.items():
        action = actions.add_parser(name, help=help_text, description=help_text)
        action.add_argument("--store", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        add_options(action)
        json_option(action)


def cache(options: argparse.Namespace) -> int | None:
    """Do the chosen action."""
    command, _, _ = CACHE_ACTIONS[options.action]
    return command(options)


def _stage_option(verb: ArgumentParser) -> None:
    verb.add_argument(
        "stage",
        nargs="?",
        default="*",
        help="a stage such as embed/t5, or a fingerprint or its beginning; all",
    )


def _repair_options(verb: ArgumentParser) -> None:
    _stage_option(verb)
    verb.add_argument("--dry-run", action="store_true", help="only say what would be done")


def _retry_options(verb: ArgumentParser) -> None:
    verb.add_argument("stage", nargs="?", default="ingest", help="a stage such as embed/t5; ingest")
    verb.add_argument(
        "--only-failed",
        action="store_true",
        help="leave units alone whose rejects cannot have passed by now, such as broken pictures",
    )
    verb.add_argument("--recipe", default="", help="the recipe to go by; that of the newest run")
    set_option(verb)


def _gc_options(verb: ArgumentParser) -> None:
    verb.add_argument("--older-than", default="30d", metavar="AGE", help="of runs to forget (30d)")
    verb.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="RECIPE",
        help="a recipe whose stages stay, however old; may be given several times",
    )
    verb.add_argument("--delete", action="store_true", help="remove it; without, only show it")


def _diff_options(verb: ArgumentParser) -> None:
    what = "a run, a fingerprint, or the beginning of either"
    verb.add_argument("before", metavar="A", help=what)
    verb.add_argument("after", metavar="B", help=what)
    verb.add_argument("--samples", type=count, default=0, metavar="N", help="show N that differ")
    verb.add_argument(
        "--values", type=count, default=0, metavar="N", help="compare the numbers of N samples"
    )


AddOptions = Callable[[ArgumentParser], None]
CACHE_ACTIONS: dict[str, tuple[Command, str, AddOptions]] = {
    "ls": (late("cache", "ls"), "list finished and unfinished stages", _stage_option),
    "verify": (
        late("cache", "verify"),
        "check every byte against its receipts",
        _stage_option,
    ),
    "repair": (
        late("cache", "repair"),
        "make broken units again, and put what was broken aside",
        _repair_options,
    ),
    "retry": (
        late("cache", "retry"),
        "ask again for samples that were rejected, and do units that failed",
        _retry_options,
    ),
    "gc": (late("cache", "gc"), "what no kept run or recipe needs", _gc_options),
    "diff": (late("diff", "diff"), "what differs between two of them", _diff_options),
}
