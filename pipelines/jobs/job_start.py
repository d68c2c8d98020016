"""What a driver does before it runs a recipe that came from elsewhere: look at it, and around."""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import RetryableError, UserError
from pipelines.jobs.job_variables import KEY_VARIABLE, take
from pipelines.jobs.package_pin import LOCK_NAME, check
from pipelines.store.location import Location, location, read_text
from pipelines.store.outages import why_it_failed

Command = Callable[[Namespace], int | None]


def prepared(command: Command) -> Command:
    """The same command, of which the recipe may be a URL; variables and packages are checked."""

    def started(options: Namespace) -> int | None:
        if KEY_VARIABLE in os.environ:
            take()  # first: among it may be the key to the bucket with the recipe
        _require(options.require_environment)
        if options.expect_environment:
            folder = _place(options.recipe).parent
            check(options.expect_environment, _text(folder / LOCK_NAME))
        with _at_hand(options.recipe) as recipe:
            options.recipe = recipe
            return command(options)

    return started


def _require(names: Sequence[str]) -> None:
    """Raise UserError naming the variables that this process lacks; their values are not told."""
    if missing := [name for name in names if not os.environ.get(name)]:
        raise UserError(
            f"--require-environment: {', '.join(missing)} must be set where this job runs, and is "
            "not: secrets do not travel with a job; set it on every node of the cluster where "
            "`ray start` runs, and start that again, or take it out of pass_environment or webhook "
            "in the profile"
        )


@contextmanager
def _at_hand(recipe: str) -> Iterator[str]:
    """A recipe in a bucket as a file for as long as it is read; anything else as it is."""
    if "://" not in recipe:
        yield recipe
        return
    place = _place(recipe)
    try:
        text = _read(place)
    except FileNotFoundError as error:
        raise UserError(
            f"no recipe at {place}: name the URL of a YAML file, a path, or a recipe of the package"
        ) from error
    with tempfile.TemporaryDirectory(prefix="ediffi-recipe-") as folder:
        path = Path(folder) / place.name
        path.write_text(text)
        yield str(path)


def _place(recipe: str) -> Location:
    try:
        return location(recipe)
    except (ValueError, ImportError) as error:
        raise UserError(
            "the recipe must be a YAML file, a name, or a URL such as s3://bucket/recipe.yaml, got "
            f"{recipe!r}: {error}"
        ) from error


def _text(place: Location) -> str:
    try:
        return _read(place)
    except FileNotFoundError:
        return ""


def _read(place: Location) -> str:
    """A file's text. Raises FileNotFoundError, RetryableError."""
    try:
        return read_text(place)
    except FileNotFoundError:
        raise
    except Exception as error:  # every store has errors of its own
        words = why_it_failed(error, place.parent)
        if words is None and not isinstance(error, OSError):
            raise
        raise RetryableError(
            f"{place} could not be read: {words or 'see the error'}; then run the same command "
            f"({type(error).__name__}: {error})"
        ) from error
