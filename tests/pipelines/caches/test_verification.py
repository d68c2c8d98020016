"""Tests of verification: every way in which a store can differ from its receipts."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.caches.lookup import Found
from pipelines.caches.verification import files_below, verify
from pipelines.planning import plan
from pipelines.recipe import Recipe
from pipelines.stage import File, Outcome, Unit
from pipelines.store.ledger import Ledger
from tests.pipelines.fake_stages import FakeStage, finish


@pytest.fixture
def found(ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]) -> Found:
    """A finished stage with two units of one file each."""
    use_stages(FakeStage(name="ingest", units=("a", "b")))
    (planned,) = plan(demo_recipe, ledger)
    finish(planned, {"a": {"a.tar": "aaaa"}, "b": {"b.tar": "bb"}})
    return Found(name="ingest", record=planned.record)


def problems(found: Found) -> list[tuple[str, str, str]]:
    return [(one.kind, one.unit, one.file) for one in verify(found).problems]


def test_a_sound_stage_is_counted(found: Found) -> None:
    """What was looked at is told."""
    verified = verify(found)
    assert (verified.num_units, verified.num_files, verified.num_bytes) == (2, 2, 6)
    assert verified.is_sound
    assert verified.problems == []


@pytest.mark.parametrize(
    ("text", "words"),
    [("aaba", "sha256 is .*, the receipt says 61be55a8e2f6b4e1"), ("aaa", "3 bytes, the receipt")],
)
def test_a_changed_file_is_found(found: Found, text: str, words: str) -> None:
    """By its digest, and without reading it if its size tells already."""
    path = found.record.directory / "a.tar"
    path.write_text(text)
    (problem,) = verify(found).problems
    assert (problem.kind, problem.unit, problem.file) == ("changed", "a", "a.tar")
    assert re.search(words, str(problem))
    assert [problem.unit for problem in verify(found).problems] == ["a"]


def test_a_missing_file_is_found(found: Found) -> None:
    """A file that vanished is as bad as one that changed."""
    (found.record.directory / "b.tar").unlink()
    assert problems(found) == [("missing", "b", "b.tar")]


def test_an_extra_file_is_told_and_harms_nobody(found: Found) -> None:
    """Files in the making and checkpoints are no strangers."""
    directory = found.record.directory
    for name in ("stray.txt", ".a.tar.0123", "durable/a/progress.jsonl", "quarantine/a.tar"):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    assert problems(found) == [("extra", "", "stray.txt")]
    assert verify(found).is_sound


def test_receipts_are_held_against_those_gathered(found: Found) -> None:
    """One unit's receipt that is missing, damaged or says something else breaks that unit."""
    path = found.record.directory / "receipts" / "a.json"
    document = json.loads(path.read_text())
    for text in (None, "{", json.dumps({**document, "num_out": 7})):
        path.unlink() if text is None else path.write_text(text)
        assert problems(found) == [("receipt", "a", "")]
        path.write_text(json.dumps(document))
    assert verify(found).is_sound


def test_gathered_receipts_are_held_against_the_manifest(found: Found) -> None:
    """A lost, doctored or damaged line is found even if every file is whole."""
    path = found.record.directory / "receipts.jsonl"
    first, second = path.read_text().splitlines(keepends=True)
    for text in (first, second + first, first + "{\n", first + '{"unit": "b"}\n'):
        path.write_text(text)
        assert {one.kind for one in verify(found).problems if not one.is_harmless} == {"stage"}
    path.unlink()
    assert ("stage", "", "receipts.jsonl") in problems(found)


def test_a_damaged_manifest_does_not_keep_units_from_being_checked(found: Found) -> None:
    """The units are gone through by their own receipts."""
    (found.record.directory / "manifest.json").write_text("{")
    (found.record.directory / "b.tar").unlink()
    assert problems(found) == [("stage", "", "manifest.json"), ("missing", "b", "b.tar")]


def test_an_unfinished_stage_is_checked_as_far_as_it_is(found: Found) -> None:
    """There is no manifest yet; the receipts that are there must hold."""
    (found.record.directory / "manifest.json").unlink()
    (found.record.directory / "a.tar").write_text("x")
    assert problems(found) == [("changed", "a", "a.tar")]


def test_an_adopted_file_is_checked_where_it_lies(found: Found, tmp_path: Path) -> None:
    """Its receipt has its absolute path."""
    path = tmp_path / "adopted.tar"
    path.write_text("mine")
    outcome = Outcome(adopted=[File(path=str(path), sha256="0" * 64, num_bytes=4)])
    (found.record.directory / "manifest.json").unlink()
    found.record.publish(Unit(id="c"), outcome, tmp_path, seconds=1, attempt=1)
    assert problems(found) == [("changed", "c", str(path))]


def test_more_units_than_a_window_are_all_checked(
    found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows bound what is in memory, not what is looked at."""
    monkeypatch.setattr("pipelines.caches.verification.WINDOW_UNITS", 1)
    for name in ("a.tar", "b.tar"):
        (found.record.directory / name).unlink()
    assert [unit for _, unit, _ in problems(found)] == ["a", "b"]


def test_files_below_a_folder(tmp_path: Path) -> None:
    """Names are relative, hidden files count; a folder that is not there has none."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / ".hidden").write_text("abc")
    assert files_below(tmp_path) == {"in/.hidden": 3}
    assert files_below(tmp_path / "absent") == {}
