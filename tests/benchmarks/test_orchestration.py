"""The no-op toy: what ours runs is what was announced, and a side that does otherwise is told."""

from pathlib import Path

import pytest

from benchmarks.orchestration import (
    COLD_LIMIT_S,
    MEASURES,
    NUM_DONE,
    TOYS,
    Toy,
    rows,
    write_recipes,
)
from benchmarks.peers import PeerError
from benchmarks.peers.orchestrators import FILES, Orchestrator
from pipelines.planning import plan
from pipelines.recipe_file import load_recipe
from pipelines.store.ledger import Ledger
from pipelines.workflow import select

PLAIN = Orchestrator(name="plain", package="pip")


def test_only_the_toy_is_run(tmp_path: Path, monkeypatch) -> None:
    """Choosing the last step chooses the toy's stages and none of the recipe's others."""
    for file in ("toy.py", "stage_noop.py"):
        (tmp_path / file).write_text((FILES / file).read_text())
    write_recipes(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, last, num_stages in (("ten", "third", 10), ("wide", "join", 3)):
        recipe = load_recipe(f"{name}.yaml")
        chosen = select(plan(recipe, Ledger.at("store")), [last])
        assert {one.name for one in chosen} == set(recipe.custom_stages)
        assert len(chosen) == num_stages


def test_every_side_has_its_scripts(tmp_path: Path) -> None:
    """What the commands name lies in the folder that they are run in."""
    for index, toy in enumerate(TOYS):
        folder = tmp_path / str(index)
        toy.prepare(folder)
        assert set(toy.commands) - {"start"} <= MEASURES.keys()
        for words in toy.commands.values():
            scripts = [word for word in words if word.endswith((".py", ".yaml"))]
            assert scripts
            assert all((folder / word).is_file() for word in scripts)


def noting(num_steps: int) -> Toy:
    """A toy whose cold run does so many steps."""
    code = f"from toy import note; [note('step') for _ in range({num_steps})]"
    return Toy(label="plain", side=PLAIN, files=(), commands={"cold": ("-c", code)})


def test_a_side_that_does_another_number_of_steps_is_no_result(tmp_path: Path) -> None:
    """Ten steps are timed; nine are an error that says so."""
    for num_steps in (NUM_DONE["cold"], NUM_DONE["cold"] - 1):
        folder, toy = tmp_path / str(num_steps), noting(num_steps)
        toy.prepare(folder)
        if num_steps == NUM_DONE["cold"]:
            assert 0 < toy.measure("cold", folder, {}) < 60
        else:
            with pytest.raises(RuntimeError, match="10 steps had to be done, done were 9"):
                toy.measure("cold", folder, {})


def test_a_failing_side_tells_what_it_said(tmp_path: Path) -> None:
    """The error holds the end of what the process printed."""
    with pytest.raises(PeerError, match="no luck"):
        PLAIN.run(tmp_path, "-c", "import sys; sys.exit('no luck')")


def test_rows_stand_beside_every_side_and_every_limit() -> None:
    """Each measure beside each side that has it; the two aims; what cold adds to Ray's start."""
    found = {
        "ediffi": {"cold": [9.0, 10.0], "finished": [0.5, 0.75]},
        "bare Ray": {"start": [8.5, 9.0], "cold": [9.0, 9.5]},
        "other": {"finished": [1.0, 1.5]},
    }
    made = {(one.measure, one.other_name): one for one in rows(found, {"python": "3"})}
    cold, finished = (f"{MEASURES[name]}, whole process" for name in ("cold", "finished"))
    assert set(made) == {
        (cold, "bare Ray"),
        (finished, "other"),
        (finished, "the most it may take"),
        (f"{MEASURES['cold']}, beyond Ray's own start", "the most it may take"),
    }
    assert made[finished, "other"].ratio == 0.5
    beyond = made[f"{MEASURES['cold']}, beyond Ray's own start", "the most it may take"]
    assert (beyond.ours, beyond.other) == (0.75, COLD_LIMIT_S)
