"""`ediffi embed`: embedding caches alone, without a recipe for training."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipelines.commands.run import execute_recipe
from pipelines.errors import UserError
from pipelines.recipe import CacheRecipe
from pipelines.recipe_file import cache_recipe, explain, load_any_recipe, parse_value
from pipelines.stages.inputs import EMBED_PREFIX

ENCODER_SYNTAX = "NAME=FAMILY:WEIGHTS[,FIELD=VALUE...]"


def embed(options: Namespace) -> None:
    """Ingest the shards and encode them; print where each cache lies."""
    recipe = recipe_of(options)
    record = execute_recipe(recipe, options, ["embed"])
    if options.json:
        return
    for row in record.stages:
        if row["name"].startswith(EMBED_PREFIX):
            print(f"{row['name']:<18} {row['state']:<7} {row['units']:>6} units  {row['path']}")


def recipe_of(options: Namespace) -> CacheRecipe:
    """The recipe that a file holds, or that SHARDS and `--encoder` describe.

    Raises:
        UserError: both are given or neither, or an option breaks a rule; names the option.
    """
    if options.recipe:
        if options.shards or options.encoders:
            raise UserError(
                "--recipe says what to encode and how: leave out SHARDS and --encoder, or change "
                "the recipe's fields with --set"
            )
        return load_any_recipe(options.recipe, options.overrides)
    document = {
        "name": options.name,
        "data": {"source": "shards", "train": _pattern(options.shards)},
        "encoders": _encoders(options.encoders),
        "resources": {
            "ingest": {"cpus": options.cpus},
            "embed": {"cpus": options.cpus, "gpus": options.gpus},
        },
    }
    if options.max_rejects_fraction is not None:
        for section in (document["data"], *document["encoders"].values()):
            section.setdefault("max_rejects_fraction", options.max_rejects_fraction)
    try:
        return cache_recipe(document, options.overrides)
    except ValidationError as error:
        raise UserError("\n".join(["embed:", *_problems(error)])) from error


def _pattern(shards: Sequence[str]) -> str:
    """The one pattern that names all tars; a directory stands for the tars in it."""
    if not shards:
        raise UserError(
            "embed takes SHARDS, such as '/data/shards/*.tar' or 's3://bucket/shards/*.tar', or "
            "--recipe FILE"
        )
    if len(shards) > 1:
        raise UserError(
            f"SHARDS must be one pattern, got {len(shards)} paths ({shards[0]}, {shards[1]}, ...): "
            "put it in quotes, so that the shell leaves it as it is"
        )
    return f"{shards[0].rstrip('/')}/*.tar" if Path(shards[0]).is_dir() else shards[0]


def _encoders(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Sections of a recipe from `--encoder` options."""
    if not texts:
        raise UserError(f"embed takes at least one --encoder {ENCODER_SYNTAX}")
    encoders: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, fields = parse_encoder(text)
        if name in encoders:
            raise UserError(f"--encoder {text}: {name!r} stands twice; give each its own name")
        encoders[name] = fields
    return encoders


def parse_encoder(text: str) -> tuple[str, dict[str, Any]]:
    """Name and fields of an encoder from `t5=transformers:google/t5-v1_1-xxl,max_tokens=113`.

    Only the first colon separates: weights may contain more, and an `@revision`.

    Raises:
        UserError: it is not written so.
    """
    what, *settings = text.split(",")
    name, equals, rest = what.partition("=")
    family, colon, weights = rest.partition(":")
    if not (name and equals and family and colon and weights):
        raise UserError(f"--encoder must read {ENCODER_SYNTAX}, got {text!r}")
    fields: dict[str, Any] = {"family": family, "weights": weights}
    for setting in settings:
        field, equals, value = setting.partition("=")
        if not (field and equals):
            raise UserError(f"--encoder {name}: {setting!r} must read FIELD=VALUE, in {text!r}")
        if field in fields:
            raise UserError(f"--encoder {name}: {field!r} stands twice, in {text!r}")
        try:
            fields[field] = parse_value(value)
        except yaml.YAMLError as error:
            raise UserError(f"--encoder {name}: {field}: {error}") from error
    return name, fields


# The options that put a field into the recipe, by the field.
_OPTIONS: Mapping[str, str] = {
    "name": "--name",
    "data.train": "SHARDS",
    "data.max_rejects_fraction": "--max-rejects-fraction",
    "resources.ingest.cpus": "--cpus",
    "resources.embed.cpus": "--cpus",
    "resources.embed.gpus": "--gpus",
}


def _problems(error: ValidationError) -> Iterator[str]:
    """Each broken field, under the option it came by."""
    for field, problem in explain(error, CacheRecipe):
        if field.startswith("encoders."):
            _, name, *inner = field.split(".")
            yield f"  --encoder {name}: " + ": ".join([*inner, problem])
        else:
            yield f"  {_OPTIONS.get(field, f'--set {field}')}: {problem}"
