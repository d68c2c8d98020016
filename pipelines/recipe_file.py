"""Reading a recipe file: YAML without its traps, overrides, and errors that name broken fields.

A misspelt field is answered with the likely right one.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from importlib import resources as package_resources
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pipelines.errors import UserError
from pipelines.recipe import CacheRecipe, Recipe

_Model = TypeVar("_Model", bound=CacheRecipe)


def load_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `section.field=value` overrides and validate the whole.

    Args:
        source: path of a YAML file, or the bare name of a recipe that comes with the package.

    Raises:
        UserError: the file cannot be read, is not YAML, or breaks a rule; every broken field is
            named with what was required and found.
    """
    return _validate(Recipe, _document(source, overrides), source)


def load_any_recipe(source: str, overrides: Sequence[str] = ()) -> CacheRecipe:
    """Read a recipe that may end with its embedding caches: without any section on training.

    Raises:
        UserError: as `load_recipe`.
    """
    document = _document(source, overrides)
    return _validate(_model_of(document), document, source)


def resolved_recipe(document: Mapping[str, Any]) -> CacheRecipe:
    """The recipe that a run kept as its `resolved` document.

    Raises:
        ValidationError: another version of ediffi wrote it.
    """
    return _model_of(document).model_validate(document)


def cache_recipe(document: dict[str, Any], overrides: Sequence[str]) -> CacheRecipe:
    """A recipe of data and encoders put together from options.

    Raises:
        ValidationError: it breaks a rule, see `explain`.
        UserError: an override is no `section.field=value`.
    """
    for override in overrides:
        _apply(document, override)
    return CacheRecipe.model_validate(document)


def parse_value(text: str) -> Any:
    """A value as a recipe file would have it. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def _document(source: str, overrides: Sequence[str]) -> dict[str, Any]:
    document = _parse(_read(source), source)
    for override in overrides:
        _apply(document, override)
    _pass_seed_on(document)
    _pass_path_on(document, source)
    return document


def _model_of(document: Mapping[str, Any]) -> type[CacheRecipe]:
    """Recipe, unless nothing in the document is about training."""
    beyond = Recipe.model_fields.keys() - CacheRecipe.model_fields.keys()
    return Recipe if beyond & document.keys() else CacheRecipe


def _validate(model: type[_Model], document: dict[str, Any], source: str) -> _Model:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        lines = "\n".join(f"  {field}: {problem}" for field, problem in explain(error, model))
        raise UserError(f"recipe {source}:\n{lines}") from error


def _pass_seed_on(document: dict[str, Any]) -> None:
    """Training runs that name no seed of their own take the recipe's."""
    models = document.get("super_resolution")
    enlarging = [one for one in models.values() if _is_dict(one)] if _is_dict(models) else []
    parents = [document.get("experts"), *enlarging, *(one.get("experts") for one in enlarging)]
    trained = [one.get("train") for one in parents if _is_dict(one)]
    for section in (document.get("base"), *trained):
        if _is_dict(section):
            section.setdefault("seed", document.get("seed", 0))


def _pass_path_on(document: dict[str, Any], source: str) -> None:
    """Custom stages that name no directory are imported from the recipe's, if they lie there.

    Others are installed, and have no directory that could be missing elsewhere.
    """
    stages, folder = document.get("custom_stages"), Path(source).parent.absolute()
    for section in stages.values() if _is_dict(stages) else ():
        if _is_dict(section) and Path(source).is_file():
            module = str(section.get("class")).partition(":")[0]
            place = folder.joinpath(*module.split("."))
            if place.with_suffix(".py").is_file() or (place / "__init__.py").is_file():
                section.setdefault("path", str(folder))


def _is_dict(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def _read(source: str) -> str:
    path = Path(source)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise UserError(f"no recipe at {path.absolute()}")
        return path.read_text()
    shipped = package_resources.files("pipelines") / "recipes"
    names = sorted(Path(entry.name).stem for entry in shipped.iterdir())
    if source not in names:
        raise UserError(
            f"no recipe {source!r}: give the path of a .yaml file or one of {', '.join(names)}"
        )
    return (shipped / f"{source}.yaml").read_text()


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's plain values and no duplicate keys.

    PyYAML follows YAML 1.1: `off` is False, `1:30:00` is 5400, `010` is 8, `2e8` is a string.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} stands twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?[0-9]+", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("float", r"[-+]?\.inf", [*"-+."]),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
    )
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        document = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"recipe {source}: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"recipe {source}: must be a mapping of sections, got {document!r}")
    return document


def _apply(document: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise UserError(f"--set takes section.field=value, got {override!r}")
    *parents, last = path.split(".")
    target = document
    for name in parents:
        target = target.setdefault(name, {})
        if not isinstance(target, dict):
            raise UserError(f"--set {override}: {name!r} is not a section")
    try:
        target[last] = parse_value(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: {error}") from error


def explain(error: ValidationError, model: type[CacheRecipe] = Recipe) -> Iterator[tuple[str, str]]:
    """Each broken field under its dotted name, with what is wrong with it."""
    for problem in error.errors():
        location = _without_tags([str(part) for part in problem["loc"]])
        field = ".".join(location) or "recipe"
        if location[-2:] == ["experts", "split"] and isinstance(problem["input"], list):
            continue  # only says that a list is no word; what is wrong with it follows
        if problem["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
            known = _fields_at(model, location[:-1])
            close = difflib.get_close_matches(location[-1], known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            yield field, f"unknown field; {hint}"
        elif problem["type"] == "missing":
            yield field, "required, but absent"
        elif problem["type"] == "value_error":
            yield field, str(problem["ctx"]["error"])
        else:
            yield field, f"{problem['msg']}, got {problem['input']!r}"


def _without_tags(location: list[str]) -> list[str]:
    """Drop the union tags that pydantic puts after `data`, `evaluate.features` and the like."""
    model = ["super_resolution", *location[1:2], "experts", "split"]
    for union in (["data"], ["evaluate", "features"], ["experts", "split"], model):
        if location[: len(union)] == union:
            return union + location[len(union) + 1 :]
    return location


def _fields_at(annotation: Any, location: Sequence[str]) -> list[str]:
    """Names of the fields a mapping at `location` below `annotation` may have."""
    location = [part for part in location if not part.isdigit()]  # all items of a list are alike
    if location:
        inner = [
            found
            for fields in _field_types(annotation)
            if (found := fields.get(location[0], fields.get("*"))) is not None
        ]
        return sorted({name for one in inner for name in _fields_at(one, location[1:])})
    return sorted({name for fields in _field_types(annotation) for name in fields})


def _field_types(annotation: Any) -> Iterator[dict[str, Any]]:
    """Fields by name of every model inside an annotation; `*` stands for any key of a dict."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield {
            field.alias or name: field.annotation for name, field in annotation.model_fields.items()
        }
    elif isinstance(annotation, type) and is_dataclass(annotation):
        yield dict(typing.get_type_hints(annotation))
    elif typing.get_origin(annotation) is dict:
        yield {"*": typing.get_args(annotation)[1]}
    else:
        for inner in typing.get_args(annotation):
            yield from _field_types(inner)
