"""Tests of pipelines.commands.embed: options that make a recipe, and errors that name them."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import parse
from pipelines.commands.embed import parse_encoder, recipe_of
from pipelines.errors import UserError
from pipelines.recipe import CacheRecipe, ReadyShards, Recipe, Resources
from tests.pipelines.fake_stages import write_run

T5 = "t5=transformers:google/t5-v1_1-xxl"


def options(*words: str) -> Namespace:
    return parse(["embed", *words])


@pytest.mark.parametrize(
    ("text", "name", "fields"),
    [
        (T5, "t5", {"family": "transformers", "weights": "google/t5-v1_1-xxl"}),
        (
            "clip=open_clip_text:hf-hub:laion/CLIP@abc,max_tokens=77,pad=keep",
            "clip",
            {
                "family": "open_clip_text",
                "weights": "hf-hub:laion/CLIP@abc",
                "max_tokens": 77,
                "pad": "keep",
            },
        ),
        ("v=open_clip_image:openai,model=ViT-L-14", "v", {"weights": "openai"}),
        ("t5=transformers:x,max_rejects_fraction=1e-3", "t5", {"max_rejects_fraction": 0.001}),
    ],
)
def test_an_encoder_in_one_word(text: str, name: str, fields: dict[str, Any]) -> None:
    """Only the first colon separates; values are read as in a recipe."""
    found_name, found = parse_encoder(text)
    assert found_name == name
    assert fields.items() <= found.items()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("t5", r"must read NAME=FAMILY:WEIGHTS\[,FIELD=VALUE\.\.\.\], got 't5'"),
        ("t5=transformers", "must read NAME=FAMILY:WEIGHTS"),
        ("=transformers:x", "must read NAME=FAMILY:WEIGHTS"),
        (f"{T5},pad", "--encoder t5: 'pad' must read FIELD=VALUE"),
        (f"{T5},pad=keep,pad=drop", "--encoder t5: 'pad' stands twice"),
        (f"{T5},family=x", "--encoder t5: 'family' stands twice"),
        (f"{T5},pad=[", "--encoder t5: pad: "),
    ],
)
def test_a_malformed_encoder_is_refused(text: str, words: str) -> None:
    """With what it must look like."""
    with pytest.raises(UserError, match=words):
        parse_encoder(text)


def test_options_make_a_recipe(tmp_path: Path) -> None:
    """Shards that are there, encoders, and what a worker takes; a directory means its tars."""
    recipe = recipe_of(
        options(
            str(tmp_path),
            *("--encoder", T5, "--encoder", "mini=transformers:m,max_rejects_fraction=0.5"),
            *("--gpus", "0.25", "--cpus", "2", "--max-rejects-fraction", "0.01"),
            *("--set", "data.max_pixels=1000", "--name", "caches"),
        )
    )
    assert type(recipe) is CacheRecipe
    assert (recipe.name, list(recipe.encoders)) == ("caches", ["t5", "mini"])
    assert isinstance(recipe.data, ReadyShards)
    assert recipe.data.train == f"{tmp_path}/*.tar"
    assert (recipe.data.held_out, recipe.data.max_pixels) == ("", 1000)
    assert recipe.data.max_rejects_fraction == 0.01
    fractions = [one.max_rejects_fraction for one in recipe.encoders.values()]
    assert fractions == [0.01, 0.5]  # an encoder's own word counts more
    assert recipe.resources_of("embed/t5") == Resources(cpus=2, gpus=0.25)
    assert recipe.resources_of("ingest") == Resources(cpus=2)


def test_a_url_is_a_pattern_too() -> None:
    """It is left as it is."""
    data = recipe_of(options("s3://bucket/shards/*.tar", "--encoder", T5)).data
    assert isinstance(data, ReadyShards)
    assert data.train == "s3://bucket/shards/*.tar"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ((), "embed takes SHARDS"),
        (("x/*.tar",), "at least one --encoder NAME=FAMILY"),
        (("a.tar", "b.tar", "--encoder", T5), r"got 2 paths \(a.tar, b.tar.*put it in quotes"),
        (("x", "--encoder", T5, "--encoder", T5), "'t5' stands twice; give each its own name"),
        (("x", "--encoder", f"{T5},max_tokns=3"), "--encoder t5: max_tokns: unknown.*max_tokens"),
        (("x", "--encoder", "t5=transfomers:y"), "--encoder t5: family: Input should be 'transf"),
        (("x", "--encoder", "T5=transformers:y"), "--encoder T5: "),
        (("x", "--encoder", "c=open_clip_text:fitted"), "weights is 'fitted', which needs"),
        (("x", "--encoder", T5, "--cpus", "-1"), "--cpus: .* greater than or equal to 0"),
        (("x", "--encoder", T5, "--max-rejects-fraction", "2"), "--max-rejects-fraction: "),
        (("x", "--encoder", T5, "--name", "A b"), "--name: "),
        (("x", "--encoder", T5, "--set", "data.max_pixls=3"), "--set data.max_pixls: unknown"),
        (("x", "--recipe", "r.yaml"), "leave out SHARDS and --encoder"),
    ],
)
def test_errors_name_the_option_and_the_field(words: tuple[str, ...], problem: str) -> None:
    """As it was typed, not as the recipe calls it."""
    with pytest.raises(UserError, match=f"(?s){problem}"):
        recipe_of(options(*words))


def test_a_file_of_data_and_encoders_will_do(tmp_path: Path) -> None:
    """No section on training is needed; a whole recipe may have them."""
    path = tmp_path / "caches.yaml"
    text = "name: c\ndata: {source: shards, train: x}\nencoders: {a: {family: %s, weights: w}}\n"
    path.write_text(text % "transformers")
    recipe = recipe_of(options("--recipe", str(path), "--set", "encoders.a.max_tokens=5"))
    assert type(recipe) is CacheRecipe
    assert recipe.encoders["a"].max_tokens == 5
    assert isinstance(recipe_of(options("--recipe", "demo")), Recipe)
    path.write_text(text % "transfomers")
    with pytest.raises(UserError, match=r"caches\.yaml:\n  encoders\.a\.family: "):
        recipe_of(options("--recipe", str(path)))


def test_people_are_told_where_each_cache_lies(
    ediffi: Callable[..., tuple], ledger: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs get the object that `run --json` prints; only the caches are asked for."""
    from pipelines.run_record import RunRecord

    asked: list[tuple[str, list[str]]] = []
    row = {"name": "embed/t5", "state": "ran", "units": 3, "path": "/store/embed/t5/0123"}
    stages = [{**row, "name": "ingest"}, row]

    def run(recipe: CacheRecipe, ledger: Any, *, selected: list[str]) -> RunRecord:
        asked.append((recipe.name, selected))
        write_run(ledger, "embed-1", stages=stages)
        return RunRecord(recipe=recipe.name, resolved={}, run_id="embed-1", stages=stages)

    monkeypatch.setattr("pipelines.workflow.run_recipe", run)
    code, out, _ = ediffi("embed", "x/*.tar", "--encoder", T5)
    assert (code, asked) == (0, [("embed", ["embed"])])
    assert out.split() == ["embed/t5", "ran", "3", "units", "/store/embed/t5/0123"]
    _, out, _ = ediffi("embed", "x/*.tar", "--encoder", T5, "--json")
    assert json.loads(out)["stages"] == stages
