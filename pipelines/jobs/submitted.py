"""Jobs in the store: what was submitted, where it went, and the recipe that travels with it.

<store>/jobs/<job id>/job.json             the record
                     /recipe.yaml          the recipe as it is run: resolved, paths made absolute
                     /requirements.lock    the packages that it must find

The same recipe, at the same place and for the same store, has the same id but for the number at its
end, which counts how often it was submitted.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from pipelines.errors import UserError
from pipelines.jobs.package_pin import LOCK_NAME
from pipelines.recipe_file import parse_value
from pipelines.stage import Json
from pipelines.store.ledger import Ledger
from pipelines.store.location import (
    Location,
    create_exclusively,
    names_in,
    read_text,
    remove_tree,
    write_atomically,
)
from pipelines.store.stage_record import dump, now

JOB_VARIABLE = "EDIFFI_JOB_ID"  # tells a driver which job it is
PARENT_VARIABLE = "EDIFFI_PARENT_RUN"  # and which run waits for it, if one does
MAX_RECIPE_LETTERS = 24  # of a recipe's name in a job's id: schedulers take 47 characters in all
# Fields of a recipe that may name a file or a folder, wherever they stand.
_PATH_FIELDS = frozenset(
    {"list", "folder", "train", "held_out", "address_prefix", "weights", "cache"}
    | {"reference", "painting", "path"}
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One submission, as in job.json.

    Attributes:
        environment: what the job's packages must be: a lock's digest, an image, or "".
        native_id: what its scheduler calls it; "" while it is being submitted.
        state: as last heard of it.
        submission: tells two submissions in the same moment apart.
    """

    job_id: str
    recipe: str
    profile: Json
    profile_name: str
    kind: str
    store: str
    stages: tuple[str, ...]
    command: tuple[str, ...]
    environment: str
    native_id: str = ""
    submitted: str = field(default_factory=now)
    host: str = field(default_factory=socket.gethostname)
    state: str = "waiting"
    reason: str = ""
    submission: str = field(default_factory=lambda: secrets.token_hex(8))

    @classmethod
    def from_record(cls, record: Json, place: Location) -> Job:
        """Raises UserError if another version wrote it, or something else."""
        try:
            words = {name: tuple(record[name]) for name in ("stages", "command")}
            datetime.fromisoformat(record["submitted"])
            if record["job_id"] != place.parent.name:
                raise ValueError(f"it is that of {record['job_id']!r}")
            return cls(**{**record, **words})
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(
                f"{place}: is no record of a job that this version reads ({error}); if no job of "
                "that name runs, remove its folder"
            ) from error


class Jobs:
    """The jobs of one store."""

    def __init__(self, ledger: Ledger) -> None:
        self._folder = ledger.store / "jobs"

    def folder(self, job_id: str) -> Location:
        return self._folder / job_id

    def write(self, job: Job) -> None:
        write_atomically(self.folder(job.job_id) / "job.json", dump(vars(job)))

    def keep(self, job: Job, recipe: str, lock: str) -> bool:
        """The record, then all that the job reads; False if that id was taken meanwhile."""
        folder = self.folder(job.job_id)
        if not create_exclusively(folder / "job.json", dump(vars(job))):
            return False
        write_atomically(folder / "recipe.yaml", recipe)
        if lock:
            write_atomically(folder / LOCK_NAME, lock)
        return True

    def keep_again(self, job: Job, recipe: str) -> None:
        """The same for a stage's job, whose id is known beforehand: drivers write it all alike."""
        self.write(job)
        write_atomically(self.folder(job.job_id) / "recipe.yaml", recipe)

    def forget(self, job_id: str) -> None:
        remove_tree(self.folder(job_id))

    def all(self) -> list[Job]:
        """Every job, newest first, but for records that cannot be read."""
        return self.all_and_unreadable()[0]

    def all_and_unreadable(self) -> tuple[list[Job], dict[str, UserError]]:
        """Every job, newest first; and why a record cannot be read, by the job's id."""
        found: list[Job] = []
        unreadable: dict[str, UserError] = {}
        for name in names_in(self._folder):
            try:
                job = self._read(name)
            except UserError as error:
                unreadable[name] = error
            else:
                found += [job] if job is not None else []
        found.sort(key=lambda job: (job.submitted, job.job_id), reverse=True)
        return found, unreadable

    def of_stem(self, stem: str) -> list[Job]:
        """Submissions of one recipe to one place, newest first."""
        names = [name for name in names_in(self._folder) if name.rpartition("-")[0] == stem]
        names = sorted((name for name in names if number_of(name)), key=number_of, reverse=True)
        return [job for name in names if (job := self._read(name)) is not None]

    def _read(self, name: str) -> Job | None:
        place = self._folder / name / "job.json"
        try:
            return Job.from_record(json.loads(read_text(place)), place)
        except (FileNotFoundError, NotADirectoryError):
            return None  # a submission that never came to be
        except ValueError as error:
            raise UserError(f"{place}: is not JSON ({error}); remove its folder") from error


def number_of(job_id: str) -> int:
    """How often it had been submitted; 0 for what is no job's id."""
    last = job_id.rpartition("-")[2]
    return int(last) if last.isdecimal() else 0


def parent_tag() -> dict[str, str]:
    """For MLflow: which run waits for this driver, if one does."""
    parent = os.environ.get(PARENT_VARIABLE, "")
    return {"ediffi.parent_run_id": parent} if parent else {}


def stem_of(recipe: str, parts: Sequence[Any]) -> str:
    """The beginning of a job's id: a function of what is run and where."""
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
    name = re.sub(r"[^a-z0-9]+", "-", recipe.lower()).strip("-")[:MAX_RECIPE_LETTERS].strip("-")
    return f"ediffi-{name}-{key}"


# -- the recipe that travels ----------------------------------------------------------------------


def travelling(document: Json, is_reachable: Callable[[str], bool]) -> Json:
    """A resolved recipe whose local paths are absolute.

    Args:
        is_reachable: whether the job's place has that path of this machine.

    Raises:
        UserError: names a file that would stay behind.
    """
    copy: Json = json.loads(json.dumps(document))
    for parent, key, where in _paths_in(copy, ""):
        path = str(Path(parent[key].removeprefix("file://")).expanduser().absolute())
        if not is_reachable(path):
            instead = "name a URL such as s3://bucket/..."
            if where.startswith("custom_stages."):
                instead = "install the module there, and not beside the recipe"
            raise UserError(
                f"{where}: {path} is on this machine, which the job's place does not share; "
                f"{instead}, or list the directory in the profile's shared_paths"
            )
        parent[key] = path
    return copy


def _paths_in(node: Any, where: str) -> Iterator[tuple[Any, Any, str]]:
    """Where a field names something that lies on this machine."""
    items: Iterator[tuple[Any, Any]]
    items = iter(node.items()) if isinstance(node, dict) else iter(enumerate(node))
    for key, value in items:
        inner = f"{where}.{key}".lstrip(".")
        if isinstance(value, dict | list):
            yield from _paths_in(value, inner)
        elif key in _PATH_FIELDS and isinstance(value, str) and _is_local(value):
            yield node, key, inner


def _is_local(text: str) -> bool:
    if not text or ("://" in text and not text.startswith("file://")):
        return False
    path = os.path.expanduser(text.removeprefix("file://"))
    return path.startswith("/") or os.path.exists(path) or bool(glob.glob(path))


def as_yaml(document: Mapping[str, Any]) -> str:
    """A recipe's text that reads back as the same document."""
    text = yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    assert parse_value(text) == document, "what is written is what is read"
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes every text but plain words: `2e8` is text to PyYAML and a number to us."""


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    is_word = re.fullmatch(r"[A-Za-z][A-Za-z_-]*", value) is not None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if is_word else '"')


_Dumper.add_representer(str, _text)
