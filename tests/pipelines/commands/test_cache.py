"""Tests of pipelines.commands.cache: `ediffi cache` on a directory and on an object store."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.caches.lookup import stages_of
from pipelines.cli import main
from pipelines.errors import RetryableError
from pipelines.jobs.submitted import Job, Jobs
from pipelines.planning import plan
from pipelines.recipe import Recipe
from pipelines.stage import Json, Outcome, Unit, Workspace
from pipelines.store import lease
from pipelines.store.ledger import Ledger
from tests.pipelines import in_process
from tests.pipelines.fake_stages import FakeStage, write_run

Ediffi = Callable[..., tuple[int, str, str]]


on_both = pytest.mark.parametrize("ledger", ["directory", "s3"], indirect=True)


@pytest.fixture
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    """An empty store: a directory, unless the test is done `on_both` kinds."""
    if getattr(request, "param", "directory") == "s3":
        return Ledger.open(request.getfixturevalue("s3_store"))
    return Ledger.open(tmp_path / "store")


@pytest.fixture
def filled(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None], run_here: list[str]
) -> Ledger:
    """A store with two finished stages and an unfinished one."""
    use_stages(
        FakeStage(name="ingest", units=("a", "b")),
        FakeStage(name="embed/t5", needs=("ingest",)),
        FakeStage(name="embed/clip", needs=("ingest",)),
    )
    in_process.run_recipe(demo_recipe, ledger)
    (unfinished,) = stages_of(ledger, "embed/clip")
    (unfinished.record.directory / "manifest.json").unlink()
    return ledger


def objects(text: str) -> list[Json]:
    return [json.loads(line) for line in text.splitlines()]


@on_both
def test_ls_tells_programs_what_the_store_holds(ediffi: Ediffi, filled: Ledger) -> None:
    """An object a stage, finished or not."""
    code, out, _ = ediffi("cache", "ls", "--json")
    listed = {row["stage"]: row for row in objects(out)}
    assert code == 0
    ingest, clip = listed["ingest"], listed["embed/clip"]
    assert (ingest["state"], ingest["units"], ingest["samples"]) == ("complete", 2, 2)
    assert (ingest["bytes"], ingest["rejects"]) == (16, {"odd": 2})
    assert (clip["state"], clip["units"], clip["run_id"]) == ("unfinished", 1, "")


def test_ls_tells_people_a_line_a_stage(ediffi: Ediffi, filled: Ledger) -> None:
    """A name or a fingerprint chooses; a damaged manifest is told and stops nothing."""
    (found,) = stages_of(filled, "embed/t5")
    assert ediffi("cache", "ls", "embed/t5")[1].split()[0] == "embed/t5"
    assert ediffi("cache", "ls", found.fingerprint[:6])[1].split()[0] == "embed/t5"
    assert "unfinished" in ediffi("cache", "ls", "embed/clip")[1]
    (found.record.directory / "manifest.json").write_text("{}")
    code, out, _ = ediffi("cache", "ls")
    assert (code, len(out.splitlines())) == (0, 3)
    assert "damaged" in out


def test_an_empty_store_says_so_aside(ediffi: Ediffi, ledger: Ledger) -> None:
    """Nothing on stdout, a word on stderr, no error; a stage by name is one."""
    assert ediffi("cache", "ls") == (0, "", f"nothing under {ledger.store}\n")
    assert ediffi("cache", "verify", "ingest")[0] == 2


def test_an_unknown_stage_ends_with_2(ediffi: Ediffi, filled: Ledger) -> None:
    """The message has what there is."""
    code, out, err = ediffi("cache", "verify", "ingst")
    assert (code, out) == (2, "")
    assert "'ingst'" in err
    assert "it has the stages embed/clip, embed/t5, ingest" in err


def test_verify_finds_a_flipped_byte(ediffi: Ediffi, filled: Ledger) -> None:
    """A whole store passes; one changed byte is found, its file named, and the code 1."""
    assert ediffi("cache", "verify")[0] == 0
    (found,) = stages_of(filled, "ingest")
    (found.record.directory / "a.txt").write_text("ingest/A")
    code, out, _ = ediffi("cache", "verify")
    assert code == 1
    assert [line[:3] for line in out.splitlines() if not line.startswith(" ")] == [
        *("ok ", "ok ", "BAD")
    ]
    assert f"unit a: {found.record.directory}/a.txt: sha256 is " in out
    (row,) = objects(ediffi("cache", "verify", "ingest", "--json")[1])
    assert (row["sound"], row["units"], row["files"]) == (False, 2, 2)
    assert [(one["kind"], one["unit"]) for one in row["problems"]] == [("changed", "a")]


@on_both
def test_repair_mends_what_verify_finds(
    ediffi: Ediffi, filled: Ledger, run_here: list[str]
) -> None:
    """A dry run only tells; afterwards verify passes and the broken bytes are in quarantine."""
    (found,) = stages_of(filled, "ingest")
    (found.record.directory / "a.txt").write_text("ingest/A")
    code, out, _ = ediffi("cache", "repair", "--dry-run")
    assert (code, run_here) == (1, [])
    assert "a: would be made again" in out
    code, out, _ = ediffi("cache", "repair")
    assert code == 0
    assert "a: made again, the bytes as before" in out
    assert (found.record.directory / "quarantine" / "a.txt").read_text() == "ingest/A"
    assert ediffi("cache", "verify")[0] == 0
    assert ediffi("cache", "repair", "--json") == (0, "", "nothing is broken\n")


def test_repair_says_what_stays_broken(
    ediffi: Ediffi, filled: Ledger, use_stages: Callable[..., None]
) -> None:
    """Without a recipe for it, nothing is touched and the code is 1."""
    (found,) = stages_of(filled, "ingest")
    (found.record.directory / "b.txt").unlink()
    use_stages(FakeStage(name="ingest", setting="another"))
    code, out, _ = ediffi("cache", "repair", "--json")
    (row,) = objects(out)
    assert (code, row["left"]) == (1, ["b"])
    assert "what it was made from has changed" in row["problems"][-1]


def test_retry_tells_what_changed(
    ediffi: Ediffi, filled: Ledger, monkeypatch: pytest.MonkeyPatch, run_here: list[str]
) -> None:
    """By the recipe of the newest run; every reject is asked again unless only failed ones are."""
    assert ediffi("cache", "retry", "--only-failed")[1].startswith("ingest/")
    assert "0 units asked again" in ediffi("cache", "retry", "--only-failed")[1]

    def run(self: FakeStage, unit: Unit, workspace: Workspace) -> Outcome:
        (workspace.scratch / f"{unit.id}.txt").write_text("more")
        return Outcome(files=[f"{unit.id}.txt"], num_in=2, num_out=2)

    monkeypatch.setattr(FakeStage, "run", run)
    code, out, err = ediffi("cache", "retry", "ingest")
    assert code == 0
    assert "2 units asked again, +2 samples" in out
    assert "a: 1 -> 2 samples; odd 1 -> no rejects" in out
    assert "by the recipe of run demo-" in err
    (row,) = objects(ediffi("cache", "retry", "--recipe", "demo", "--json")[1])
    assert (row["stage"], row["units"]) == ("ingest", [])


def test_retry_needs_a_recipe_and_a_stage(ediffi: Ediffi, ledger: Ledger) -> None:
    """A store without runs, and a stage that never ran, are told."""
    code, _, err = ediffi("cache", "retry", "ingest")
    assert code == 2
    assert "no runs in" in err
    assert "--recipe FILE" in err
    write_run(ledger, "run-1")
    assert "its recipe does not fit" in ediffi("cache", "retry")[2]
    assert "--set changes a recipe" in ediffi("cache", "retry", "--set", "seed=1")[2]


@on_both
def test_gc_removes_nothing_unasked(
    ediffi: Ediffi, filled: Ledger, use_stages: Callable[..., None], demo_recipe: Recipe
) -> None:
    """It shows what nobody needs with its bytes; --delete removes that and nothing else."""
    use_stages(FakeStage(name="ingest", setting="unneeded"))
    (planned,) = plan(demo_recipe, filled)
    finish_empty(filled, planned.fingerprint)
    use_stages(
        FakeStage(name="ingest", units=("a", "b")),
        FakeStage(name="embed/t5", needs=("ingest",)),
        FakeStage(name="embed/clip", needs=("ingest",)),
    )
    code, out, _ = ediffi("cache", "gc")
    assert code == 0
    assert f"ingest/{planned.fingerprint}  (no kept run or recipe needs it)" in out
    assert "to remove; --delete does it" in out
    assert len(stages_of(filled)) == 4
    rows = objects(ediffi("cache", "gc", "--delete", "--json")[1])
    assert {"deleted": True}.items() <= rows[-1].items()
    assert {found.name for found in stages_of(filled)} == {"ingest", "embed/t5", "embed/clip"}
    assert len(stages_of(filled)) == 3
    assert ediffi("cache", "verify")[0] == 0


def finish_empty(ledger: Ledger, fingerprint: str) -> None:
    record = ledger.stage("ingest", fingerprint)
    record.open({"version": 1, "config": {}, "input": {}}, {})
    record.complete("ingest", {}, {}, {}, [], "run-0")


def test_gc_keeps_what_a_named_recipe_needs(ediffi: Ediffi, filled: Ledger) -> None:
    """Whatever the age of its runs."""
    age = ("--older-than", "0m")
    assert len(objects(ediffi("cache", "gc", *age, "--json")[1])) >= 3
    rows = objects(ediffi("cache", "gc", *age, "--keep", "demo", "--json")[1])
    assert [row for row in rows if "needs it" in row["why"]] == []
    assert ediffi("cache", "gc", "--older-than", "soon")[0] == 2


def test_gc_tells_what_stays(
    ediffi: Ediffi, filled: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody works there: the rest goes, the code is 1, and only what went is called removed."""
    (found,) = stages_of(filled, "ingest")
    held = lease.take(found.record.directory, lease.Owner.of_this_process("run-9"))
    age = ("--older-than", "0m", "--delete")
    code, out, _ = ediffi("cache", "gc", *age, "--json")
    row = next(row for row in objects(out) if row["path"] == str(found.record.directory))
    assert (code, row["deleted"]) == (1, False)
    assert "run run-9 on" in row["left"]
    code, out, _ = ediffi("cache", "gc", *age)
    assert (code, out.splitlines()[-1].split()) == (1, ["0", "bytes", "removed"])
    held.release()
    assert ediffi("cache", "gc", *age)[0] == 0
    assert stages_of(filled) == []


def test_gc_asks_what_became_of_jobs(
    ediffi: Ediffi, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody may have since it was submitted; one whose scheduler is silent counts as open."""
    asked: list[str] = []
    place = {"profile": {"kind": "local"}, "kind": "local", "profile_name": "laptop"}
    named = {"recipe": "demo", "store": "s", "stages": (), "command": (), "environment": ""}
    for number in (1, 2, 3):
        job_id, state = f"ediffi-demo-0123-{number}", "finished" if number == 3 else "waiting"
        job = Job(
            job_id=job_id,
            **place,
            **named,
            native_id="7",
            state=state,
            submitted="2026-01-01T00:00:00+00:00",
        )
        Jobs(ledger).write(job)

    def heard(jobs: Jobs, job: Job) -> Job:
        asked.append(job.job_id)
        if job.job_id.endswith("2"):
            raise RetryableError("nobody answers")
        jobs.write(replace(job, state="finished"))
        return job

    monkeypatch.setattr("pipelines.commands.schedulers.heard", heard)
    code, out, err = ediffi("cache", "gc", "--json")
    assert code == 0
    assert sorted(asked) == ["ediffi-demo-0123-1", "ediffi-demo-0123-2"]
    assert [row["why"] for row in objects(out)] == ["a job of long ago"]
    assert "job ediffi-demo-0123-2 is taken for waiting, as last heard: nobody answers" in err


@on_both
def test_diff_shows_settings_and_units(
    ediffi: Ediffi, filled: Ledger, use_stages: Callable[..., None], demo_recipe: Recipe
) -> None:
    """Of two stages, or of all stages of two runs."""
    (old,) = stages_of(filled, "ingest")
    before = filled.runs()[0]["run_id"]
    use_stages(FakeStage(name="ingest", units=("a", "c"), setting=5))
    in_process.run_recipe(demo_recipe, filled)
    (new,) = [one for one in stages_of(filled, "ingest") if one.fingerprint != old.fingerprint]
    code, out, _ = ediffi("cache", "diff", old.fingerprint, new.fingerprint)
    assert code == 0
    assert "setting config.setting: 0 -> 5" in out
    assert "1 same, 1 added, 1 removed" in out
    (row,) = objects(ediffi("cache", "diff", old.fingerprint, f"{new.address}", "--json")[1])
    assert row["units"] == {"same": 1, "added": 1, "removed": 1}
    assert [(one["unit"], one["kind"]) for one in row["first"]] == [
        ("b", "removed"),
        ("c", "added"),
    ]
    after = next(run["run_id"] for run in filled.runs() if run["run_id"] != before)
    rows = objects(ediffi("cache", "diff", before, after, "--json")[1])
    assert [row["after"] for row in rows] == [new.address]
    assert main(["--store", str(filled.store), "cache", "diff", "ingest", "zzz"]) == 2
