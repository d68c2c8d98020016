"""The documentation tells the truth: fields, defaults, fingerprints, commands, shipped recipes."""

from __future__ import annotations

import re
import shlex
import typing
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel

from ediffi.degradation import DegradationConfig, DegradationPass
from ediffi.train.config import TrainConfig
from pipelines import recipe as models
from pipelines.cli import COMMANDS, build_parser
from pipelines.planning import plan
from pipelines.recipe_file import load_recipe
from pipelines.recipe_sections import custom as recipe_custom
from pipelines.recipe_sections import evaluation as recipe_evaluation
from pipelines.recipe_sections import resources as recipe_resources
from pipelines.recipe_sections import sampling as recipe_sampling
from pipelines.recipe_sections import super_resolution as recipe_super_resolution
from pipelines.stages.training import NOT_IN_IDENTITY
from pipelines.store.ledger import Ledger

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("README.md"), *(ROOT / "docs").glob("*.md")])
RECIPES = sorted(path.stem for path in (ROOT / "pipelines" / "recipes").glob("*.yaml"))

# Heading in docs/recipes.md -> the model that its table tells of, less the fields told elsewhere.
SECTIONS: dict[str, tuple[type, type | None]] = {
    "Top level": (models.Recipe, None),
    "Lists: `source: urls` and `source: folder`": (models.Pictures, None),
    "Addresses: `source: urls`": (models.UrlList, models.Pictures),
    "Files: `source: folder`": (models.PictureFolder, models.Pictures),
    "Tars: `source: shards`": (models.ReadyShards, None),
    "`data.held_out`": (models.HeldOut, None),
    "`clip_fit`": (models.ClipFit, None),
    "`encoders`": (models.Encoder, None),
    "`noise`": (models.Noise, None),
    "`network`": (models.Network, None),
    "`base` and `experts.train`": (TrainConfig, None),
    "`experts`": (models.Experts, None),
    "`experts.split`": (models.Interval, None),
    "`super_resolution`": (models.SuperResolution, None),
    "`super_resolution.experts`": (recipe_super_resolution.SuperResolutionExperts, None),
    "`super_resolution.network`": (recipe_super_resolution.EfficientNetwork, None),
    "`super_resolution.degradation`": (DegradationConfig, None),
    "`super_resolution.degradation.first` and `second`": (DegradationPass, None),
    "`sample`": (recipe_sampling.Sampling, None),
    "`sample.styles`": (recipe_sampling.StyleExample, None),
    "`sample.paintings`": (recipe_sampling.PaintingExample, None),
    "`sample.enlarging`": (recipe_sampling.Enlarging, None),
    "`evaluate`": (recipe_evaluation.Evaluation, None),
    "`evaluate.features`: `kind: clip`": (recipe_evaluation.ClipFeatures, None),
    "`evaluate.features`: `kind: open_clip`": (recipe_evaluation.OpenClipFeatures, None),
    "`evaluate.features`: `kind: timm`": (recipe_evaluation.TimmFeatures, None),
    "`evaluate.features`: `kind: inception`": (recipe_evaluation.InceptionFeatures, None),
    "`evaluate.guidance_curve`": (recipe_evaluation.GuidanceCurve, None),
    "`evaluate.text_ablation`": (recipe_evaluation.TextAblation, None),
    "`evaluate.attention`": (recipe_evaluation.AttentionByNoise, None),
    "`evaluate.painting`": (recipe_evaluation.PaintingCases, None),
    "`evaluate.painting.cases`": (recipe_evaluation.PaintedCase, None),
    "`evaluate.painting.cases.phrases`": (recipe_evaluation.PaintedPhrase, None),
    "`evaluate.style`": (recipe_evaluation.StyleTransfer, None),
    "`resources`": (recipe_resources.Resources, None),
    "`custom_stages`": (recipe_custom.CustomStage, None),
}

# Place in the demo's recipe -> heading of its table. `resources` is planned with its own test.
PLACES = {
    "": "Top level",
    "data": "Addresses: `source: urls`",
    "data.": "Lists: `source: urls` and `source: folder`",  # the same place, shared fields
    "data.held_out": "`data.held_out`",
    "clip_fit": "`clip_fit`",
    "encoders.clip_other_text": "`encoders`",
    "noise": "`noise`",
    "network": "`network`",
    "base": "`base` and `experts.train`",
    "experts.train": "`base` and `experts.train`",
    "sample": "`sample`",
    "evaluate": "`evaluate`",
    "resources.base": "`resources`",
}
# Values that the rule of `_other` cannot find; None: no other value fits the demo's recipe.
OTHER_VALUES: dict[str, Any] = {
    "data.list": None,  # absent here, as any other path would be
    "data.source": None,
    "data.held_out": None,  # sections: their fields are tried instead
    "data.held_out.value": None,  # counts only with a column
    "evaluate.features": {"kind": "clip", "encoder": "clip_other"},
    "evaluate.text_encoder": "clip_other_text",
    "encoders.clip_other_text.weights": "hf-hub:someone/clip",
    "encoders.clip_other_text.cache": None,  # read when planned: tested with the stage
    "sample.prompts": ["a red circle"],
    "sample.guidance_interval": [0.0, 10.0],
    "sample.churn": None,  # of heun alone: tested with the section
    "sample.churn_sigma_max": 10.0,
    "sample.styles": None,  # name files, which are absent here: tested with the stage
    "sample.paintings": None,
    "sample.enlarging": {"num_steps": 5},
    "evaluate.guidance_curve": {"scales": [1.0, 2.0]},
    "evaluate.text_ablation": {"num_pictures": 8},
    "evaluate.attention": {"num_samples": 8},
    "evaluate.painting": {
        "cases": [
            {
                "prompt": "a red circle on the left",
                "phrases": [{"phrase": "red circle", "box": [0, 0, 0.5, 1]}],
            }
        ]
    },
    "evaluate.style": {"column": "shape"},
    "resources.base.custom": {"licence": 1},
    "resources.base.node_group": "gpu",
    "resources.base.timeout_s": 60.0,
    "resources.base.start_deadline_s": 60.0,
    "experts.min_success": 1,
    **{
        f"{place}.{field}": value
        for place in ("base", "experts.train")
        for field, value in {
            "spike_factor": 10.0,
            "offload_optimizer": None,  # from ZeRO 1 on
            "offload_parameters": None,
            "ema_std": None,  # of profile power alone: tested with the stage
            "ema_track_stds": None,
            "ema_snapshot_images": None,
        }.items()
    },
}


def _rows(heading: str) -> dict[str, tuple[str, str]]:
    """The (default, fingerprint) cells of the table below a heading, by field."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    parts = re.split(r"^##+ (.+)$", text, flags=re.M)
    body = dict(zip(parts[1::2], parts[2::2]))[heading]
    cells = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \| [^|]+ \| ([^|]+) \|$", body, flags=re.M)
    return {field: (default, address) for field, default, address in cells}


def _defaults(model: type) -> dict[str, Any]:
    """Default of every field as JSON; MISSING where the field is required."""
    if issubclass(model, BaseModel):
        return {
            field.alias or name: MISSING
            if field.is_required()
            else _plain(field.get_default(call_default_factory=True))
            for name, field in model.model_fields.items()
        }
    return {field.name: _plain(field.default) for field in fields(model)}


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, DegradationConfig | DegradationPass):
        return "published"  # the section's own table tells what
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_field_is_told_with_its_default(heading: str) -> None:
    """Each table of docs/recipes.md has all fields of its section, and their defaults."""
    model, less = SECTIONS[heading]
    left_out = set(_defaults(less)) if less else set()
    expected = {name: one for name, one in _defaults(model).items() if name not in left_out}
    rows = _rows(heading)
    assert list(rows) == list(expected)
    for name, (cell, _) in rows.items():
        told = MISSING if cell == "required" else yaml.safe_load(cell.strip("`"))
        assert told == expected[name], name


def test_every_section_has_a_table() -> None:
    """A section added to the recipe must be told too."""
    told = {model for model, _ in SECTIONS.values()}
    sections = {
        one
        for module in (
            models,
            recipe_custom,
            recipe_evaluation,
            recipe_resources,
            recipe_sampling,
            recipe_super_resolution,
        )
        for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, models.Section)
    }
    shared = {models.Section, models.CacheRecipe, recipe_sampling.SamplerSettings}
    assert sections - shared <= told
    silent = {
        name for name, (_, address) in _rows("`base` and `experts.train`").items() if address == "–"
    }
    assert silent == set(NOT_IN_IDENTITY)


def _fields_of_the_demo() -> Iterator[tuple[str, str, str, str]]:
    """(place, field, default cell, fingerprint cell) of every field that the demo may have."""
    for place, heading in PLACES.items():
        for field, (default, address) in _rows(heading).items():
            if place or field in {"name", "seed"}:
                yield place.rstrip("."), field, default, address


def _document() -> dict[str, Any]:
    document = yaml.safe_load((ROOT / "pipelines" / "recipes" / "demo.yaml").read_text())
    document["data"] |= {"list": "/absent/captions.parquet", "held_out": {"fraction": 0.1}}
    document["evaluate"]["alignment"] = "clip"
    document["encoders"] |= {
        "clip_other": {"family": "open_clip_image", "weights": "fitted"},
        "clip_other_text": {"family": "open_clip_text", "weights": "fitted"},
    }
    return document


def _other(model: type, field: str, value: Any) -> Any:
    """Another valid value of a field."""
    annotation = typing.get_type_hints(model)[field]
    if typing.get_origin(annotation) is Literal:
        return next(one for one in typing.get_args(annotation) if one != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value or 1
    if isinstance(value, float):
        return value / 2 or 0.5
    return [*value, value[-1]] if isinstance(value, list) and value else "other"


def _fingerprints(document: dict[str, Any], store: Path) -> dict[str, str]:
    recipe = models.Recipe.model_validate(document)
    return {one.name: one.fingerprint for one in plan(recipe, Ledger(store))}


def _changed(place: str, field: str, default: str) -> dict[str, Any] | None:
    """The demo's recipe with another value in one field; None where there is no such value."""
    path = f"{place}.{field}".lstrip(".")
    document = section = _document()
    for name in filter(None, place.split(".")):
        section = section.setdefault(name, {})
    heading = next(h for p, h in PLACES.items() if p.rstrip(".") == place and field in _rows(h))
    if path not in OTHER_VALUES:
        absent = None if default == "required" else yaml.safe_load(default.strip("`"))
        section[field] = _other(SECTIONS[heading][0], field, section.get(field, absent))
    elif OTHER_VALUES[path] is None:
        return None
    else:
        section[field] = OTHER_VALUES[path]
    return document


def test_the_fingerprint_column_is_true(tmp_path: Path) -> None:
    """Change any field of the demo: the first stage to miss is the one the table names, or none."""
    before = _fingerprints(_document(), tmp_path)
    for place, field, default, address in _fields_of_the_demo():
        if (document := _changed(place, field, default)) is None:
            continue
        after = _fingerprints(document, tmp_path)
        misses = [name.split("/")[0] for name in after if after[name] != before[name]]
        named = re.findall(r"`(\w+)`", address)[-1 if place == "experts.train" else 0 :]
        assert misses[:1] == named[:1], f"{place}.{field}"


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipe_is_valid_and_told(name: str, tmp_path: Path) -> None:
    """Every recipe of the package can be planned without its data, and docs/recipes.md lists it."""
    assert not any(one.is_hit for one in plan(load_recipe(name), Ledger(tmp_path)))
    assert f"| `{name}` |" in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_the_papers_recipe_sees_as_many_images_as_the_paper() -> None:
    """Base and three experts of ediffi-64px add up to 1.9M iterations of 2048 images."""
    recipe = load_recipe("ediffi-64px")
    assert recipe.base.final_images + 3 * recipe.experts.train.final_images == 1_900_000 * 2048
    decay = 0.5 ** (recipe.base.batch_images / recipe.base.ema_half_life_images)
    assert decay == pytest.approx(0.9999, abs=1e-9)


def _commands(text: str) -> Iterator[str]:
    """Every `ediffi ...` in backticks or at the beginning of a line of a code block."""
    yield from re.findall(r"`(ediffi\s[^`]+)`", text)
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.M | re.S):
        yield from re.findall(r"^(ediffi .+)$", block, flags=re.M)


def _verb(command: str) -> str:
    """The word after `ediffi` that is neither an option nor the store's path."""
    return re.sub(r"--store[ =]\S+|--?[a-z]\S*", "", command).split()[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_documents_exist(page: Path) -> None:
    """A command told in a document exists, or the paragraph says that it is coming."""
    for paragraph in re.split(r"\n\s*\n", page.read_text(encoding="utf-8")):
        if "coming" not in paragraph:
            assert {_verb(one) for one in _commands(paragraph)} <= COMMANDS.keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_in_documents_parse(page: Path) -> None:
    """What a block of shell has people type is a valid command line, with all its options."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for line in re.findall(r"^ediffi .+$", "\n".join(blocks), flags=re.M):
        assert build_parser().parse_args(shlex.split(line, comments=True)[1:]).verb in COMMANDS


def test_recipe_of_the_tutorial_is_valid(tmp_path: Path) -> None:
    """The recipe that docs/tutorial.md has people write can be planned as it stands."""
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    (tmp_path / "my.yaml").write_text(re.findall(r"```yaml\n(.*?)```", text, flags=re.S)[0])
    assert plan(load_recipe(str(tmp_path / "my.yaml")), Ledger(tmp_path))
