"""Tests of pipelines.recipe_file: YAML's traps, overrides and files that are no recipes."""

from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import UserError
from pipelines.recipe import CacheRecipe
from pipelines.recipe_file import load_any_recipe, load_recipe, resolved_recipe

DEMO = (resources.files("pipelines") / "recipes" / "demo.yaml").read_text()


def load(tmp_path: Path, text: str, *overrides: str) -> Any:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(str(path), overrides)


def test_a_file_and_a_shipped_name_give_the_same_recipe(tmp_path: Path) -> None:
    """A recipe of the package is an ordinary file that anybody could have written."""
    assert load(tmp_path, DEMO) == load_recipe("demo")


def test_an_absent_file_is_named_in_full(tmp_path: Path) -> None:
    """A path that leads nowhere is said whole, since the directory is often what is wrong."""
    with pytest.raises(UserError, match=f"no recipe at {tmp_path}/none.yaml"):
        load_recipe(str(tmp_path / "none.yaml"))


def test_an_unknown_name_lists_the_shipped_recipes() -> None:
    """A word that is neither a YAML file nor a shipped recipe is answered with all of them."""
    with pytest.raises(UserError, match=r"no recipe 'dmo'.* demo, .*emoji-32px"):
        load_recipe("dmo")


@pytest.mark.parametrize("text", ["", "- a list", "just words"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    """YAML of another kind says so instead of failing later."""
    with pytest.raises(UserError, match="must be a mapping of sections"):
        load(tmp_path, text)


def test_broken_yaml_names_file_and_line(tmp_path: Path) -> None:
    """A syntax error tells where it is."""
    with pytest.raises(UserError, match=r"recipe\.yaml.*(?s:.*)line 2"):
        load(tmp_path, "name: demo\nbase: [1\n")


@pytest.mark.parametrize(
    ("text", "name"),
    [("seed: 1\n", "seed"), ("base: {total_images: 1, total_images: 2}\n", "total_images")],
)
def test_duplicate_keys_are_refused(tmp_path: Path, text: str, name: str) -> None:
    """YAML would let the second of two equal keys win without a word, at any depth."""
    with pytest.raises(UserError, match=f"'{name}' stands twice"):
        load(tmp_path, f"seed: 0\n{text}")


def test_numbers_mean_what_they_look_like() -> None:
    """`2e8` and `2_000` are numbers, `010` is ten and `08` no error, as nobody expects octals."""
    recipe = load_recipe(
        "demo", ["base.total_images=2e8", "experts.train.total_images=2_000", "seed=010"]
    )
    assert recipe.base.total_images == 200_000_000
    assert recipe.experts.train.total_images == 2000
    assert recipe.seed == 10
    assert load_recipe("demo", ["seed=08"]).seed == 8


def test_a_time_of_day_is_no_number() -> None:
    """`1:30:00`, which YAML 1.1 reads as 5400, is refused where a number must stand."""
    with pytest.raises(UserError, match=r"data\.timeout_s: .*'1:30:00'"):
        load_recipe("demo", ["data.timeout_s=1:30:00"])


@pytest.mark.parametrize("word", ["off", "no", "on", "yes", "1:30:00", "2026-01-01"])
def test_words_stay_words(word: str) -> None:
    """A text field gets the very letters of the file, whatever YAML 1.1 would make of them."""
    assert load_recipe("demo", [f"data.caption_column={word}"]).data.caption_column == word


def test_an_empty_value_is_an_error_that_names_the_field() -> None:
    """A field whose value was forgotten does not quietly take its default."""
    with pytest.raises(UserError, match=r"network: .*got None"):
        load_recipe("demo", ["network="])
    with pytest.raises(UserError, match=r"data\.image_px: .*got None"):
        load_recipe("demo", ["data.image_px="])


def test_overrides_are_applied_in_order_and_may_be_lists_or_mappings() -> None:
    """`--set` takes YAML; a later one wins; sections that were absent come into being."""
    recipe = load_recipe(
        "demo",
        [
            "network.widths=[8, 16]",
            "sample.prompts=[a red dot, 'a, b']",
            "base.lr=1",
            "base.lr=0.5",
            "resources.base={num_workers: 2}",
            "resources.sample.cpus=2",
        ],
    )
    assert recipe.network.widths == (8, 16)
    assert recipe.sample.prompts == ("a red dot", "a, b")
    assert recipe.base.lr == 0.5
    assert recipe.resources["base"].num_workers == 2
    assert recipe.resources["sample"].cpus == 2


def test_a_value_may_hold_an_equals_sign() -> None:
    """Only the first `=` parts field and value: addresses have more."""
    recipe = load_recipe("demo", ["data.address_prefix=http://a/?b=c"])
    assert recipe.data.address_prefix == "http://a/?b=c"


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("base.lr", "--set takes section.field=value, got 'base.lr'"),
        ("=1", "--set takes section.field=value"),
        ("seed.x=1", "--set seed.x=1: 'seed' is not a section"),
        ("sample.seeds.0=1", "'seeds' is not a section"),
        ("base.lr=[1", "--set base.lr=\\[1: while parsing"),
    ],
)
def test_a_bad_override_is_quoted(override: str, answer: str) -> None:
    """An override that cannot be applied is shown as it was typed, with the reason."""
    with pytest.raises(UserError, match=answer):
        load_recipe("demo", [override])


CACHES = """
name: caches
data: {source: shards, train: /data/*.tar}
encoders: {t5: {family: transformers, weights: google/t5-v1_1-xxl}}
"""


def test_a_recipe_may_end_with_its_caches(tmp_path: Path) -> None:
    """Without any section on training it is one of data and encoders; with one it is whole."""
    path = tmp_path / "caches.yaml"
    path.write_text(CACHES)
    recipe = load_any_recipe(str(path), ["encoders.t5.max_tokens=113"])
    assert type(recipe) is CacheRecipe
    assert recipe.encoders["t5"].max_tokens == 113
    assert load_any_recipe("demo") == load_recipe("demo")
    path.write_text(CACHES + "base: {}\n")
    with pytest.raises(UserError, match="network: required, but absent"):
        load_any_recipe(str(path))
    path.write_text(CACHES + "encoder: {}\n")
    with pytest.raises(UserError, match="encoder: unknown field; did you mean 'encoders'"):
        load_any_recipe(str(path))


def test_what_a_run_has_kept_is_read_back(tmp_path: Path) -> None:
    """Whole recipes and recipes of caches alike."""
    path = tmp_path / "caches.yaml"
    path.write_text(CACHES)
    for recipe in (load_recipe("demo"), load_any_recipe(str(path))):
        again = resolved_recipe(recipe.model_dump(mode="json"))
        assert type(again) is type(recipe)
        assert again == recipe
