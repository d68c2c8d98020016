"""Tests of pipelines.caches.garbage: what is needed stays, whatever else goes."""

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from pipelines.caches.garbage import (
    check_still_at_rest,
    find_garbage,
    find_kept,
    parse_age,
    remove,
)
from pipelines.caches.lookup import stages_of
from pipelines.errors import UserError
from pipelines.ledger import Ledger
from pipelines.planning import PlannedStage, plan
from pipelines.recipe import Recipe
from pipelines.stage import File, Json, Outcome, Unit
from tests.pipelines.fake_stages import FakeStage, finish, write_run

DAY = timedelta(days=1)


def fill(
    ledger: Ledger, recipe: Recipe, use_stages: Callable[..., None], setting: Json
) -> dict[str, PlannedStage]:
    """Two finished stages under a setting; they are what the recipe gives from now on."""
    use_stages(
        FakeStage(name="ingest", setting=setting), FakeStage(name="embed/t5", needs=("ingest",))
    )
    planned = {one.name: one for one in plan(recipe, ledger)}
    for one in planned.values():
        finish(one, {"a": {"a.txt": f"{one.name} {setting}"}})
    return planned


def rows(*planned: PlannedStage) -> list[Json]:
    return [{"name": one.name, "fingerprint": one.fingerprint} for one in planned]


def ago(age: timedelta) -> str:
    return (datetime.now(UTC) - age).isoformat(timespec="milliseconds")


def places(ledger: Ledger, *recipes: Recipe, older_than: timedelta = DAY) -> list[str]:
    kept = find_kept(ledger, recipes, older_than)
    root = ledger.store
    return [str(one.place.relative_to(root)) for one in find_garbage(ledger, kept)]


@pytest.mark.parametrize(
    ("text", "age"), [("90m", DAY / 16), ("12h", DAY / 2), ("30d", 30 * DAY), ("2w", 14 * DAY)]
)
def test_ages(text: str, age: timedelta) -> None:
    """Minutes, hours, days and weeks."""
    assert parse_age(text) == age


@pytest.mark.parametrize("text", ["30", "d", "1.5d", "-1d", "1y"])
def test_what_is_no_age_is_refused(text: str) -> None:
    """With examples of what is."""
    with pytest.raises(UserError, match="30d or 2w, got"):
        parse_age(text)


def test_stages_of_recent_runs_stay(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> None:
    """Also those that only their record still names; what they were made from stays with them."""
    old = fill(ledger, demo_recipe, use_stages, "old")
    new = fill(ledger, demo_recipe, use_stages, "new")
    write_run(ledger, "run-1", started=ago(2 * DAY), stages=rows(*old.values()))
    write_run(ledger, "run-2", started=ago(DAY / 2), stages=rows(new["embed/t5"]))
    gone = {f"{one.name}/{one.fingerprint}" for one in old.values()}
    assert set(places(ledger)) == gone
    assert places(ledger, older_than=3 * DAY) == []


def test_stages_of_a_recipe_to_keep_stay(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> None:
    """However long ago it ran."""
    old = fill(ledger, demo_recipe, use_stages, "old")
    write_run(ledger, "run-1", started=ago(90 * DAY), stages=rows(*old.values()))
    assert len(places(ledger)) == 2
    assert places(ledger, demo_recipe) == []


def test_stages_of_a_run_under_way_are_not_touched(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> None:
    """Neither they nor the work in flight, however long ago it began."""
    planned = fill(ledger, demo_recipe, use_stages, "new")
    directory = planned["ingest"].record.directory
    (directory / f".a.txt.{'0' * 32}").write_text("being written")
    (ledger.store / ".scratch" / "x").mkdir(parents=True)
    fingerprints = {one.name: one.fingerprint for one in planned.values()}
    begun = {"started": ago(90 * DAY), "state": "running", "planned": fingerprints}
    write_run(ledger, "run-1", **begun)
    assert places(ledger) == []
    write_run(ledger, "run-1", **begun, process_started=1.0)  # its driver is gone
    assert ".scratch" in places(ledger)


def test_left_over_files_of_a_kept_stage_go(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> None:
    """Files whose writer died, and what a repair has put aside; published files stay."""
    planned = fill(ledger, demo_recipe, use_stages, "new")
    directory = planned["ingest"].record.directory
    for name in (f".a.txt.{'0' * 32}", "b.tar.partial", "quarantine/a.txt", "durable/a/x.partial"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("12345")
    (ledger.store / ".scratch" / "x").mkdir(parents=True)
    found = list(find_garbage(ledger, find_kept(ledger, [demo_recipe], DAY)))
    names = [str(one.place.relative_to(ledger.store)) for one in found]
    stage = f"ingest/{planned['ingest'].fingerprint}"
    assert names == [
        ".scratch",
        f"{stage}/quarantine",
        f"{stage}/.a.txt.{'0' * 32}",
        f"{stage}/b.tar.partial",
    ]
    assert [one.num_bytes for one in found] == [0, 5, 5, 5]
    for one in found:
        remove(one)
    assert places(ledger, demo_recipe) == []
    assert (directory / "a.txt").exists()


def test_a_stage_whose_files_another_adopted_stays(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None], tmp_path: Path
) -> None:
    """Its receipts name files that lie in the other stage's folder."""
    donor = fill(ledger, demo_recipe, use_stages, "donor")["embed/t5"]
    path = donor.record.directory / "a.txt"
    use_stages(FakeStage(name="embed/adopts"))
    (adopter,) = plan(demo_recipe, ledger)
    finish(adopter)
    (adopter.record.directory / "manifest.json").unlink()
    outcome = Outcome(adopted=[File(path=str(path), sha256="0", num_bytes=1)])
    adopter.record.publish(Unit(id="a"), outcome, tmp_path, seconds=1, attempt=1)
    assert places(ledger, demo_recipe) == []  # not even ingest, which the donor was made from


def test_removing_a_stage_leaves_nothing_of_it(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> None:
    """Its folder has another name before the first file goes; a removal cut short is finished."""
    fill(ledger, demo_recipe, use_stages, "old")
    kept = find_kept(ledger, [], DAY)
    for one in list(find_garbage(ledger, kept)):
        remove(one)
    assert stages_of(ledger) == []
    half = ledger.store / "ingest" / ".gone-0123"
    half.mkdir(parents=True)
    (half / "a.txt").write_text("x")
    (one,) = find_garbage(ledger, kept)
    remove(one)
    assert list(half.parent.iterdir()) == []


def test_a_run_that_begins_meanwhile_is_seen(ledger: Ledger) -> None:
    """It may need what is about to go."""
    kept = find_kept(ledger, [], DAY)
    check_still_at_rest(ledger, kept)
    mine = psutil.Process(os.getpid()).create_time()
    write_run(ledger, "run-9", state="running", process_started=mine)
    with pytest.raises(UserError, match="run-9 began meanwhile"):
        check_still_at_rest(ledger, kept)
