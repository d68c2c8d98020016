"""The fan-out's recipes: whatever the number of experts, they start from one base."""

from pathlib import Path

import yaml

from benchmarks.fanout import _write_recipe, training_recipe, write_pictures
from pipelines.planning import plan
from pipelines.recipe_file import load_recipe
from pipelines.store.ledger import Ledger


def test_all_numbers_of_experts_share_one_base(tmp_path: Path, monkeypatch) -> None:
    """One, two and three experts differ in the stage `experts` and what follows, nowhere before."""
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path)
    addresses = []
    for num_experts in (1, 2, 3):
        _write_recipe(tmp_path, training_recipe(num_experts, 640))
        recipe = load_recipe("recipe.yaml")
        assert len(recipe.experts.intervals(recipe.noise.distribution)) == num_experts
        addresses.append({one.name: one.fingerprint for one in plan(recipe, Ledger.at("store"))})
    assert len({one["base"] for one in addresses}) == 1
    assert len({one["experts"] for one in addresses}) == 3


def test_sections_that_are_not_wanted_are_left_out(tmp_path: Path) -> None:
    """None takes a section of the toy's recipe away."""
    _write_recipe(tmp_path, {"name": "x", "clip_fit": None})
    document = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert document["name"] == "x"
    assert "clip_fit" not in document
