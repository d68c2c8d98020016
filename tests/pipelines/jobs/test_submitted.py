"""Jobs in the store, and the recipe that travels with one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.errors import UserError
from pipelines.jobs.submitted import Job, Jobs, as_yaml, number_of, stem_of, travelling
from pipelines.planning import plan
from pipelines.recipe import Recipe
from pipelines.recipe_file import load_any_recipe, load_recipe, parse_value
from pipelines.store.ledger import Ledger


def job_of(job_id: str, **values: Any) -> Job:
    """A job that was submitted."""
    fixed: dict[str, Any] = {"recipe": "demo", "profile": {"kind": "local"}, "kind": "local"}
    fixed |= {"profile_name": "laptop", "store": "s", "stages": ("base",), "command": ("x",)}
    return Job(job_id=job_id, environment="", **(fixed | values))


def everywhere(path: str) -> bool:
    """A place that shares all files with this machine."""
    return True


def test_a_job_is_kept_and_found(ledger: Ledger) -> None:
    """With its recipe and its lock; a change of its state is kept too."""
    jobs, job = Jobs(ledger), job_of("ediffi-demo-0123-1")
    assert jobs.all() == []
    assert jobs.keep(job, "name: demo\n", "ray==1\n")
    folder = ledger.store / "jobs" / job.job_id
    assert sorted(path.name for path in folder.iterdir()) == [
        *("job.json", "recipe.yaml", "requirements.lock")
    ]
    jobs.write(replace(job, state="running"))
    assert jobs.all() == [replace(job, state="running")]
    jobs.forget(job.job_id)
    assert jobs.all() == []


def test_of_two_submissions_one_wins(ledger: Ledger) -> None:
    """The second of the same number is told so, and changes nothing."""
    jobs = Jobs(ledger)
    first, second = job_of("ediffi-demo-0123-1"), job_of("ediffi-demo-0123-1")
    assert jobs.keep(first, "a: 1\n", "")
    assert not jobs.keep(second, "a: 2\n", "")
    assert jobs.all() == [first]
    assert (jobs.folder(first.job_id) / "recipe.yaml").read_text() == "a: 1\n"


def test_submissions_of_one_recipe_are_numbered(ledger: Ledger) -> None:
    """The newest comes first, and ten after nine."""
    jobs = Jobs(ledger)
    for number in (1, 2, 9, 10):
        jobs.keep(job_of(f"ediffi-demo-0123-{number}"), "", "")
    jobs.keep(job_of("ediffi-demo-4567-3"), "", "")
    (ledger.store / "jobs" / "ediffi-demo-0123-11").mkdir()  # it never came to be
    (ledger.store / "jobs" / "ediffi-demo-0123-notes").mkdir()
    found = [number_of(job.job_id) for job in jobs.of_stem("ediffi-demo-0123")]
    assert found == [10, 9, 2, 1]


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "is not JSON"), ('{"job_id": "x"}', "no record of a job that this version reads")],
)
def test_a_damaged_record_is_named(ledger: Ledger, text: str, words: str) -> None:
    """With the file, and what to do; it hides no other job."""
    path = ledger.store / "jobs" / "ediffi-demo-0123-1" / "job.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    jobs = Jobs(ledger)
    with pytest.raises(UserError, match=rf"ediffi-demo-0123-1/job\.json: .*{words}.*remove its"):
        jobs.of_stem("ediffi-demo-0123")
    jobs.keep(job_of("ediffi-demo-4567-1"), "name: demo\n", "")
    found, unreadable = jobs.all_and_unreadable()
    assert [one.job_id for one in found] == ["ediffi-demo-4567-1"]
    assert list(unreadable) == ["ediffi-demo-0123-1"]


def test_the_id_is_a_function_of_what_is_run_and_where() -> None:
    """Equal parts give equal ids; it fits every scheduler, whatever the recipe is called."""
    assert stem_of("demo", ["a", 1]) == stem_of("demo", ["a", 1]) != stem_of("demo", ["a", 2])
    long = stem_of("My_Recipe.With A Very Long Name Indeed", [])
    assert long.startswith("ediffi-my-recipe-with-a-very-lo")
    assert len(f"{long}-1000") <= 47


@pytest.mark.parametrize("name", ["demo", "emoji-32px", "ediffi-64px", "ediffi-1024px"])
def test_a_recipe_reads_back_as_it_was(name: str, tmp_path: Path) -> None:
    """The file that travels makes the same recipe, field for field."""
    recipe = load_any_recipe(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(as_yaml(recipe.model_dump(mode="json", by_alias=True)))
    assert load_any_recipe(str(path)) == recipe


def test_text_that_looks_like_something_else_stays_text() -> None:
    """YAML has many ways to misunderstand a word."""
    document = {
        "a": "2e8",
        "b": "off",
        "c": "null",
        "d": "1:30",
        "e": "",
        "f": "x: y # z",
        "g": 2e8,
    }
    assert parse_value(as_yaml(document)) == document
    assert yaml.safe_load(as_yaml(document)) == document


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are there; hub names, URLs and other words stay as they are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.parquet").touch()
    (tmp_path / "weights").mkdir()
    document = {
        "data": {"list": "list.parquet", "address_prefix": "https://x/"},
        "encoders": {"t5": {"weights": "weights"}, "b": {"weights": "google/t5"}},
        "sample": {"styles": [{"reference": "file:///pictures/a.png", "prompt": "list.parquet"}]},
    }
    assert travelling(document, everywhere) == {
        "data": {"list": str(tmp_path / "list.parquet"), "address_prefix": "https://x/"},
        "encoders": {"t5": {"weights": str(tmp_path / "weights")}, "b": {"weights": "google/t5"}},
        "sample": {"styles": [{"reference": "/pictures/a.png", "prompt": "list.parquet"}]},
    }
    assert document["data"]["list"] == "list.parquet"


def test_a_file_that_would_stay_behind_is_named() -> None:
    """With its field, and the two ways out."""
    document = {"data": {"list": "/home/me/list.parquet"}}
    with pytest.raises(
        UserError, match=r"data\.list: /home/me/list\.parquet is on this machine.*shared_paths"
    ):
        travelling(document, lambda path: path.startswith("/shared"))
    document = {"data": {"list": "/shared/list.parquet"}}
    assert travelling(document, lambda path: path.startswith("/shared")) == document


def test_a_module_that_would_stay_behind_is_to_be_installed() -> None:
    """No URL helps there: Python imports from directories."""
    document = {"custom_stages": {"one": {"class": "mine:One", "path": "/home/me"}}}
    with pytest.raises(UserError, match=r"custom_stages\.one\.path: .*install the module there"):
        travelling(document, lambda path: False)


def test_travelling_changes_no_fingerprint(
    demo_data: Recipe, ledger: Ledger, tmp_path: Path
) -> None:
    """Work that a run by hand has done is done for the job too."""
    document = travelling(demo_data.model_dump(mode="json", by_alias=True), everywhere)
    path = tmp_path / "recipe.yaml"
    path.write_text(as_yaml(document))
    here = {one.name: one.fingerprint for one in plan(demo_data, ledger)}
    there = {one.name: one.fingerprint for one in plan(load_recipe(str(path)), ledger)}
    assert here == there


@pytest.fixture
def demo_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The demo's recipe with a list that is named relative to the working directory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    rows = [
        {"key": f"k{i}", "url": f"{i}.png", "caption": "a", "split": s}
        for i, s in enumerate(["train", "held_out"] * 4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), "captions.parquet")
    return load_recipe("demo", ["data.list=captions.parquet"])
