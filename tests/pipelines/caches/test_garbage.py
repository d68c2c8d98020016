"""Tests of pipelines.caches.garbage: what is needed stays, whatever else goes."""

import errno
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipelines.caches.garbage import (
    Garbage,
    Sweep,
    check_still_at_rest,
    find_garbage,
    find_kept,
    parse_age,
    remove,
)
from pipelines.caches.lookup import stages_of
from pipelines.errors import UserError
from pipelines.planning import PlannedStage, plan
from pipelines.recipe import Recipe
from pipelines.stage import File, Json, Outcome, Unit
from pipelines.store import lease, pulse
from pipelines.store.ledger import Ledger
from pipelines.store.processes import process_table
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
    ledger.new_scratch("run-1")
    pulse.folder(ledger.store, "run-1").mkdir(parents=True)
    fingerprints = {one.name: one.fingerprint for one in planned.values()}
    begun = {"started": ago(90 * DAY), "state": "running", "planned": fingerprints}
    write_run(ledger, "run-1", **begun)
    assert places(ledger) == []
    gone = {"process_started": 1.0, "process_table": process_table()}
    write_run(ledger, "run-1", **begun, **gone)
    found = places(ledger)
    assert found[0] == ".scratch/run-1"
    assert "runs/run-1" not in found  # by it the next run sees what to close in MLflow


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
        ".scratch/x",
        f"{stage}/quarantine",
        f"{stage}/.a.txt.{'0' * 32}",
        f"{stage}/b.tar.partial",
    ]
    assert [one.num_bytes for one in found] == [0, 5, 5, 5]
    for one in found:
        remove(one)
    assert places(ledger, demo_recipe) == []
    assert (directory / "a.txt").exists()


def test_logs_go_with_the_age_of_their_run(ledger: Ledger) -> None:
    """Those of runs of which nothing is known any more too; a run under way keeps its logs."""
    for name, state, age in (("old", "failed", 2), ("new", "failed", 0), ("on", "running", 2)):
        write_run(ledger, name, state=state, started=ago(age * DAY))
    for name in ("old", "new", "on", "unknown"):
        (ledger.store / "logs" / name / "base").mkdir(parents=True)
    assert places(ledger) == ["logs/old", "logs/unknown"]


def test_what_a_finished_stage_no_longer_needs_goes(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> None:
    """Checkpoints, fences and leases of earlier drivers; the last token and the progress stay."""
    planned = fill(ledger, demo_recipe, use_stages, "new")["ingest"]
    directory = planned.record.directory
    held = lease.acquire(directory, lease.Owner.of_this_process("run-1"))
    assert isinstance(held, lease.Lease)
    held.release()
    lease.fence(directory, "a", 2, token=held.token)
    names = ["durable/a/checkpoints/images-1/x.pt", "durable/a/levels/low/checkpoints/y.pt"]
    for name in (*names, "durable/a/progress.jsonl", "lease/00000000.json"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("12345")
    stage = f"ingest/{planned.fingerprint}"
    going = [
        f"{stage}/durable/a/checkpoints",
        f"{stage}/durable/a/levels/low/checkpoints",
        f"{stage}/lease/00000000.json",
        f"{stage}/lease/fences/a/00000001-000002",
    ]
    assert places(ledger, demo_recipe) == going
    planned.record.forget("a")
    assert places(ledger, demo_recipe) == going[2:]  # an unfinished stage goes on from checkpoints


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
    write_run(ledger, "run-9", state="running")
    with pytest.raises(UserError, match="run-9 began meanwhile"):
        check_still_at_rest(ledger, kept)


def test_the_age_of_a_run_is_counted_from_its_end(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> None:
    """A run begun long ago and stopped just now is to go on, from its checkpoints."""
    planned = fill(ledger, demo_recipe, use_stages, "new")
    stages = rows(*planned.values())
    write_run(
        ledger, "run-1", state="stopped", started=ago(31 * DAY), ended=ago(DAY / 24), stages=stages
    )
    assert places(ledger) == []
    write_run(
        ledger, "run-1", state="stopped", started=ago(31 * DAY), ended=ago(2 * DAY), stages=stages
    )
    assert len(places(ledger)) == 2


def test_a_run_that_nobody_saw_end_keeps_its_stages(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> None:
    """Its driver may only be silent, and the next start goes on with its work."""
    planned = fill(ledger, demo_recipe, use_stages, "new")
    gone = {"process_started": 1.0, "process_table": process_table()}
    begun = {"started": ago(90 * DAY), "state": "running", "stages": rows(*planned.values())}
    write_run(ledger, "run-1", **begun, **gone)
    assert places(ledger) == []


def test_a_stage_that_was_only_leased_goes(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> None:
    """Its driver was killed before it noted anything there; a kept one stays."""
    use_stages(FakeStage(name="ingest"), FakeStage(name="embed/t5", needs=("ingest",)))
    kept = plan(demo_recipe, ledger)[1]
    for name, address in (("embed/t5", kept.fingerprint), ("embed/t5", "0" * 16), ("x", "1" * 16)):
        lease.take(
            ledger.stage(name, address).directory, lease.Owner.of_this_process("a")
        ).release()
    assert places(ledger, demo_recipe) == [f"embed/t5/{'0' * 16}", f"x/{'1' * 16}"]


@pytest.mark.parametrize(
    ("name", "text"), [("identity.json", '{"iden'), ("receipts.jsonl", '{"unit": "a"')]
)
def test_damage_in_a_kept_stage_is_named(
    ledger: Ledger,
    demo_recipe: Recipe,
    use_stages: Callable[..., None],
    name: str,
    text: str,
) -> None:
    """What it needs cannot be told, so nothing goes before it is mended."""
    planned = fill(ledger, demo_recipe, use_stages, "new")["ingest"]
    (planned.record.directory / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name}: .* found something else"):
        find_kept(ledger, [demo_recipe], DAY)


def garbage(ledger: Ledger) -> list[Garbage]:
    return list(find_garbage(ledger, find_kept(ledger, [], DAY)))


def test_a_stage_that_somebody_works_on_stays(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> None:
    """A run between its plan and its record shows by the lease alone; without it the stage goes."""
    planned = fill(ledger, demo_recipe, use_stages, "old")["ingest"]
    held = lease.take(planned.record.directory, lease.Owner.of_this_process("run-9"))
    told = {one.place.parent.name: remove(one) for one in garbage(ledger)}
    assert told["t5"] == ""
    assert "run run-9 on" in told["ingest"]
    assert planned.record.is_complete
    held.release()
    assert [remove(one) for one in garbage(ledger)] == [""]
    assert stages_of(ledger) == []


def test_a_full_disk_can_be_cleared(
    ledger: Ledger,
    demo_recipe: Recipe,
    use_stages: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where there is no room for a lease, what nobody holds goes without one."""
    fill(ledger, demo_recipe, use_stages, "old")

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr("pipelines.store.lease.create_exclusively", no_room)
    assert [remove(one) for one in garbage(ledger)] == ["", ""]
    assert stages_of(ledger) == []


def test_what_could_not_be_removed_is_told(
    ledger: Ledger,
    demo_recipe: Recipe,
    use_stages: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A folder in it that this user may not write, for one."""
    fill(ledger, demo_recipe, use_stages, "old")
    (ledger.store / "logs" / "run-0").mkdir(parents=True)
    monkeypatch.setattr("pipelines.caches.garbage.remove_tree", lambda place: None)
    told = [remove(one) for one in garbage(ledger)]
    assert len(told) == 3
    assert all("is still there: see the rights" in one for one in told)


def test_runs_are_looked_for_now_and_then(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, demo_recipe: Recipe, use_stages: Callable
) -> None:
    """Before the first removal, and again after some seconds: a look reads the record of each."""
    fill(ledger, demo_recipe, use_stages, "old")
    kept = find_kept(ledger, [], DAY)
    sweep, found = Sweep(ledger, kept), garbage(ledger)
    assert sweep.remove(found[0]) == ""
    write_run(ledger, "run-9", state="running")
    monkeypatch.setattr("time.monotonic", lambda: float("inf"))
    with pytest.raises(UserError, match="run-9 began meanwhile"):
        sweep.remove(found[1])
    with pytest.raises(UserError, match="run-9 began meanwhile"):
        Sweep(ledger, kept).remove(found[1])
