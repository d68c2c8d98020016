"""A stage of the user's own: their class, found by its name and run as if it were one of ours.

The class is a frozen dataclass with a field `config`. It has a `version`, `plan(inputs)` and
`run(unit, workspace)` as in `pipelines.stage.Stage`; `identity()` if its bytes depend on something
else than its config, or not on all of it; and, if it likes, `gang`, `check` and `amend`.

Its fingerprint knows the code of its module and of all that this imports from the same directory.
Every worker imports the module by itself, from the directory that the recipe says or from what is
installed there; one that finds other code than the run was planned with refuses to run it.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import json
import os
import sys
import traceback
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipelines.errors import RetryableError, StageFailed, UserError
from pipelines.recipe_sections.custom import CustomStage as Section
from pipelines.source_closure import closure_digest
from pipelines.stage import Json, Manifest, Outcome, Stage, Unit, Workspace
from pipelines.store.fingerprint import canonical
from pipelines.store.outages import why_it_failed

_REQUIRED = ("version", "plan", "run")
_OURS = Path(__file__).parents[1]  # what is raised there says all there is to say
_NO_STORE = Path(os.devnull)  # no file lies below it


@dataclass(frozen=True, kw_only=True)
class Custom:
    """Stands for the user's class wherever a stage is expected; travels as words."""

    name: str
    needs: tuple[str, ...]
    class_path: str  # package.module:Class
    path: str
    config: str  # JSON
    code: str  # digest of what the class consists of

    @classmethod
    def of(cls, name: str, section: Section, needs: tuple[str, ...]) -> Custom:
        """The stage that a recipe describes.

        Raises:
            UserError: the class cannot be imported, is no stage, or does not take that config.
        """
        field = f"custom_stages.{name}"
        with _at(f"{field}.config", section.path):
            config = json.dumps(dict(section.config), sort_keys=True, allow_nan=False)
        with _at(f"{field}.class", section.path):
            made = cls(
                name=name,
                needs=needs,
                class_path=section.class_path,
                path=section.path,
                config=config,
                code=_code(section.class_path, section.path),
            )
            own = _load(section.class_path, section.path).own
        with _at(f"{field}.config", section.path):
            _config(own, made.config)
        return made

    @property
    def version(self) -> int:
        with self._says("version"):
            return int(self._own.version)

    @property
    def gang(self) -> bool:
        with self._says("gang"):
            return bool(getattr(self._own, "gang", False))

    @property
    def check(self) -> Callable[..., None] | None:
        return self._guarded("check")

    @property
    def amend(self) -> Callable[..., Sequence[Unit]] | None:
        if (own := self._guarded("amend")) is None:
            return None

        def call(*inputs: Any) -> list[Unit]:
            with self._says("amend"):  # it may be a generator
                return list(self._units("amend", own(*inputs) or ()))

        return call

    def identity(self) -> Json:
        config = json.loads(self.config)
        with self._says("identity"):
            own = getattr(self._own, "identity", None)
            if own is not None:
                config = own()
                canonical(config)  # raises for what is no JSON
        return {"class": self.class_path, "code": self.code, "config": config}

    def plan(self, inputs: Mapping[str, Manifest]) -> Iterator[Unit]:
        with self._says("plan"):
            yield from self._units("plan", self._own.plan(inputs))

    def _units(self, word: str, listed: Iterable[object]) -> Iterator[Unit]:
        for unit in listed:
            if not isinstance(unit, Unit):
                raise UserError(
                    f"custom_stages.{self.name}: {word}: must give units, such as "
                    f'pipelines.stage.Unit(id="a"), got {unit!r}'
                )
            yield unit

    def _guarded(self, word: str) -> Callable[..., Any] | None:
        """A method of the user's that they may leave out; its errors are those of the recipe."""
        with self._says(word):
            own: Callable[..., Any] | None = getattr(self._own, word, None)
        if own is None:
            return None

        def call(*inputs: Any) -> Any:
            with self._says(word):
                return own(*inputs)

        return call

    def _says(self, word: str) -> AbstractContextManager[None]:
        """Whatever goes wrong within is told as that of this part of the user's class."""
        return _at(f"custom_stages.{self.name}: {word}", self.path)

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        loaded = _load(self.class_path, self.path)
        if loaded.code != self.code:
            raise UserError(
                f"custom_stages.{self.name}.class: the code of {self.class_path} on this node, "
                f"{loaded.file}, is not what the run was planned with; if it was edited since, "
                "start the run again, else bring this node's copy up to date"
            )
        return self._own.run(unit, workspace)

    @property
    def _own(self) -> Any:
        return _made(self.class_path, self.path, self.config)


def add_custom(stages: Sequence[Stage], sections: Mapping[str, Section]) -> list[Stage]:
    """Our stages, and after them the user's, each behind those it needs.

    Raises:
        UserError: one needs what is not there, or itself by a detour; or as `Custom.of`.
    """
    done, waiting = list(stages), dict(sections)
    while waiting:
        names = [stage.name for stage in done]
        ready = [
            name
            for name, section in waiting.items()
            if not any(_stands_for(need, other) for need in section.needs for other in waiting)
        ]
        if not ready:
            raise UserError(f"custom_stages: {', '.join(waiting)} need one another in a circle")
        done += [
            Custom.of(name, waiting[name], _needs(name, waiting[name], names)) for name in ready
        ]
        waiting = {name: section for name, section in waiting.items() if name not in ready}
    return done


def _needs(name: str, section: Section, known: Sequence[str]) -> tuple[str, ...]:
    """The stages that a custom one needs by their full names, each once."""
    found: dict[str, None] = {}
    for need in section.needs:
        meant = [other for other in known if _stands_for(need, other)]
        if not meant:
            close = difflib.get_close_matches(need, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(known)}"
            raise UserError(f"custom_stages.{name}.needs: no stage {need!r} in this recipe; {hint}")
        found |= dict.fromkeys(meant)
    return tuple(found)


def _stands_for(word: str, name: str) -> bool:
    """Whether a stage is meant by a word, as `embed/t5` is by `embed`."""
    return word in (name, name.split("/")[0])


# -- the user's module ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loaded:
    """A class of the user's, and the code that this process has of it."""

    own: Any
    code: str
    file: str


@functools.cache
def _load(class_path: str, path: str) -> _Loaded:
    """Import the class. Once a process: what was imported stays, whatever becomes of the file."""
    module_name, _, class_name = class_path.partition(":")
    root = _root(module_name, path)
    code = closure_digest(module_name, root)
    if str(root) not in sys.path:
        sys.path.append(str(root))  # at the end: nothing of Python's own is hidden
    module = importlib.import_module(module_name)
    file = str(Path(module.__file__ or "").absolute())
    if not Path(file).is_relative_to(root):
        raise ValueError(
            f"{module_name} must come from {root}, but another of that name was found first, "
            f"{file}: give the module another name"
        )
    own = getattr(module, class_name, None)
    if own is None:
        raise ValueError(f"{file} has no class {class_name!r}")
    lacking = [name for name in _REQUIRED if not hasattr(own, name)]
    if not is_dataclass(own) or lacking or "config" not in {field.name for field in fields(own)}:
        raise ValueError(
            f"{class_path} must be a dataclass with a field `config` and have "
            f"{', '.join(_REQUIRED)}; see pipelines.stage.Stage"
            + (f". It lacks {', '.join(lacking)}" if lacking else "")
        )
    return _Loaded(own, code, file)


def _code(class_path: str, path: str) -> str:
    """The digest of the code as it lies there now."""
    module_name = class_path.partition(":")[0]
    return closure_digest(module_name, _root(module_name, path))


def _root(module_name: str, path: str) -> Path:
    """The directory that the outermost package of a module lies in."""
    depth = module_name.count(".")
    place = Path(path, *module_name.split("."))
    if path and (place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()):
        return Path(path).absolute()
    outermost = importlib.util.find_spec(module_name.partition(".")[0])
    spec = importlib.util.find_spec(module_name) if outermost is not None else None
    if spec is None or spec.origin is None:
        where = f"in {path} or " if path else ""
        raise ValueError(
            f"no module {module_name!r} {where}on the path of Python; put it beside the recipe, "
            "name its directory as `path`, or install it"
        )
    file = Path(spec.origin).absolute()
    return file.parents[depth + (file.name == "__init__.py")]


@functools.cache
def _made(class_path: str, path: str, config: str) -> Any:
    own = _load(class_path, path).own
    return own(config=_config(own, config))


def _config(own: Any, config: str) -> Any:
    """A recipe's values as what the class says of its field `config`."""
    wanted, values = typing.get_type_hints(own)["config"], json.loads(config)
    if is_dataclass(wanted):
        known = [field.name for field in fields(wanted)]
        for name in values:
            if name not in known:
                raise ValueError(f"unknown field {name!r}; known: {', '.join(known)}")
    try:
        return TypeAdapter(wanted).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "config"
        raise ValueError(f"{field}: {first['msg']}, got {first['input']!r}") from error


@contextmanager
def _at(field: str, folder: str) -> Iterator[None]:
    """Whatever the user's own code raises is told with the recipe's field, and its place.

    Failures of a store or a disk pass: whoever knows the store tells what is wrong with it.

    Args:
        folder: of the user's modules; their last line there is told. "": the last line of all.
    """
    try:
        yield
    except (UserError, RetryableError, StageFailed):
        raise
    except Exception as error:
        if why_it_failed(error, _NO_STORE):
            raise
        raise UserError(f"{field}: {_words(error, folder)}") from error


def _words(error: Exception, folder: str) -> str:
    """What we say of a class or a config that does not fit; else the error with its place."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, ValueError) and Path(frames[-1].filename).is_relative_to(_OURS):
        return str(error)
    theirs = [one for one in frames if folder and Path(one.filename).is_relative_to(folder)]
    last = (theirs or frames)[-1]
    text = f": {error}" if str(error) else ""
    return f"{type(error).__name__}{text} ({last.filename}:{last.lineno})"
