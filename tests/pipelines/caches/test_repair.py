"""Tests of repair: units made again, because they broke or because the cause is gone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from pipelines.caches.lookup import RecipeFinder, stages_of
from pipelines.caches.repair import drop_lost_manifests, find_broken, prepare_retry, repair
from pipelines.caches.verification import verify
from pipelines.driver.progress import Progress
from pipelines.driver.runner import Runner
from pipelines.errors import UserError
from pipelines.planning import plan
from pipelines.recipe import Recipe
from pipelines.stage import Outcome, Unit, Workspace
from pipelines.store.ledger import Ledger
from tests.pipelines import in_process
from tests.pipelines.fake_stages import FakeStage, finish


@dataclass(frozen=True, kw_only=True)
class Fetching(FakeStage):
    """Rejects one sample of each unit for the reason that stands in a file, if there is one."""

    reasons: Path

    def run(self, unit: Unit, workspace: Workspace) -> Outcome:
        (workspace.scratch / f"{unit.id}.txt").write_text(self.name)
        path = self.reasons / unit.id
        rejects = {path.read_text(): ["k"]} if path.exists() else {}
        told = "" if workspace.previous is None else "again"
        (workspace.scratch / f"{unit.id}.txt").write_text(f"{self.name}{told}")
        return Outcome(
            files=[f"{unit.id}.txt"], num_in=2, num_out=2 - len(rejects), rejects=rejects
        )


@pytest.fixture
def store(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None], run_here: list[str]
) -> Ledger:
    """A store that a run of two stages has filled."""
    use_stages(
        FakeStage(name="ingest", units=("a", "b"), keys={"a": "rows:1", "b": "rows:2"}),
        FakeStage(name="embed/t5", needs=("ingest",), units=("a",), keys={"a": "captions:1"}),
    )
    in_process.run_recipe(demo_recipe, ledger)
    return ledger


def test_broken_units_are_made_again_and_compared(store: Ledger, run_here: list[str]) -> None:
    """Only they; what was changed is put aside, and the bytes are the old ones again."""
    (ingest,) = stages_of(store, "ingest")
    (embed,) = stages_of(store, "embed")
    (ingest.record.directory / "a.txt").write_text("changed!")
    (embed.record.directory / "a.txt").unlink()
    contents = ingest.record.manifest().contents
    broken = find_broken(stages_of(store))
    assert [(one.found.name, one.units) for one in broken] == [
        ("ingest", ["a"]),
        ("embed/t5", ["a"]),
    ]
    finder = RecipeFinder(store)
    for one in broken:
        mended = repair(store, one, finder)
        assert (list(mended.equal), list(mended.different)) == (["a"], [])
    assert all(verify(found).is_sound for found in stages_of(store))
    assert (ingest.record.directory / "quarantine" / "a.txt").read_text() == "changed!"
    assert ingest.record.manifest().contents == contents
    receipt = ingest.record.receipt("a")
    assert receipt is not None
    assert receipt.reason == "retry"


def test_other_bytes_are_told(
    store: Ledger, use_stages: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit that comes out differently is named: later stages will see it too."""
    (ingest,) = stages_of(store, "ingest")
    (ingest.record.directory / "b.txt").unlink()
    before = ingest.record.manifest().contents

    def run(self: FakeStage, unit: Unit, workspace: Workspace) -> Outcome:
        (workspace.scratch / "b.txt").write_text("other bytes")
        return Outcome(files=["b.txt"], num_in=2, num_out=2)

    monkeypatch.setattr(FakeStage, "run", run)
    (broken,) = find_broken([ingest])
    assert list(repair(store, broken, RecipeFinder(store)).different) == ["b"]
    assert ingest.record.manifest().contents != before


def test_nothing_broken_is_taken_over_from_an_earlier_fingerprint(
    store: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None], run_here: list[str]
) -> None:
    """Hard links share the damage: a unit that was taken over is made, not taken over again."""
    keys = {"a": "rows:1", "b": "rows:2"}
    use_stages(FakeStage(name="ingest", units=("a", "b"), keys=keys, setting="new"))
    in_process.run_recipe(demo_recipe, store)
    (planned,) = plan(demo_recipe, store)
    receipt = planned.record.receipt("a")
    assert receipt is not None
    assert receipt.taken_from
    with (planned.record.directory / "a.txt").open("r+") as stream:
        stream.write("X")  # both places of the file change
    broken = find_broken(stages_of(store, planned.fingerprint))
    (mended,) = [repair(store, one, RecipeFinder(store)) for one in broken]
    assert list(mended.equal) == ["a"]
    assert verify(mended.found).is_sound


def test_without_a_recipe_nothing_is_touched(
    store: Ledger, use_stages: Callable[..., None]
) -> None:
    """What cannot be made again is left as it is, with the reason."""
    (ingest,) = stages_of(store, "ingest")
    (ingest.record.directory / "a.txt").write_text("changed!")
    use_stages(FakeStage(name="ingest", setting="another list"))
    (broken,) = find_broken([ingest])
    with pytest.raises(UserError, match="what it was made from has changed"):
        repair(store, broken, RecipeFinder(store))
    assert (ingest.record.directory / "a.txt").read_text() == "changed!"
    assert ingest.record.is_complete


@pytest.mark.parametrize("name", ["manifest.json", "receipts.jsonl"])
def test_a_damaged_manifest_is_written_anew(store: Ledger, name: str) -> None:
    """No unit is done again for it."""
    (ingest,) = stages_of(store, "ingest")
    contents = ingest.record.manifest().contents
    (ingest.record.directory / name).write_text("{")
    broken = find_broken(stages_of(store))
    drop_lost_manifests(broken)
    (mended,) = [repair(store, one, RecipeFinder(store)) for one in broken]
    assert not [*mended.equal, *mended.different]
    assert ingest.record.manifest().contents == contents
    assert verify(ingest).is_sound


def test_stages_of_the_user_are_made_again_after_what_they_read(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None], run_here: list[str]
) -> None:
    """Whatever their names, and with a sound stage in between."""
    use_stages(
        FakeStage(name="z"),
        FakeStage(name="mine", needs=("z",)),
        FakeStage(name="a", needs=("mine",)),
        FakeStage(name="ingest", needs=("a",)),
    )
    in_process.run_recipe(demo_recipe, ledger)
    for name in ("a", "z", "ingest"):
        (found,) = stages_of(ledger, name)
        (found.record.directory / "a.txt").unlink()
    assert [one.found.name for one in find_broken(stages_of(ledger))] == ["z", "a", "ingest"]


def test_a_damaged_identity_is_written_anew(store: Ledger) -> None:
    """Units whose keys hold stay as they are."""
    (ingest,) = stages_of(store, "ingest")
    (ingest.record.directory / "identity.json").write_text('{"iden')
    broken = find_broken(stages_of(store))
    assert [str(one.problems[0]) for one in broken if "identity.json: must" in str(one.problems[0])]
    drop_lost_manifests(broken)
    (mended,) = [repair(store, one, RecipeFinder(store)) for one in broken]
    assert not [*mended.equal, *mended.different]
    assert ingest.inputs() == {}
    assert verify(ingest).is_sound


# -- retries --------------------------------------------------------------------------------------


def reject(folder: Path, reasons: Mapping[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for unit, reason in reasons.items():
        (folder / unit).write_text(reason)
    return folder


def test_only_what_may_have_passed_is_asked_for_again(
    ledger: Ledger,
    demo_recipe: Recipe,
    tmp_path: Path,
    use_stages: Callable[..., None],
    run_here: list[str],
) -> None:
    """A timeout is, a broken picture is not; the rest of the stage stays as it is."""
    folder = reject(tmp_path / "reasons", {"a": "timeout", "b": "image_truncated"})
    use_stages(Fetching(name="ingest", units=("a", "b", "c"), reasons=folder))
    in_process.run_recipe(demo_recipe, ledger)
    (found,) = stages_of(ledger, "ingest")
    before = found.record.manifest()
    (narrow,) = prepare_retry(ledger, "ingest", demo_recipe, only_failed=True)
    (wide,) = prepare_retry(ledger, "ingest", demo_recipe, only_failed=False)
    assert (list(narrow.rejected), list(wide.rejected)) == (["a"], ["a", "b"])
    reject(folder, {})
    narrow.run()
    (change,) = narrow.changes()
    assert (change.unit, change.num_before, change.num_after) == ("a", 1, 2)
    assert (change.rejects_before, change.rejects_after) == ({"timeout": 1}, {})
    after = found.record.manifest()
    assert (before.totals.num_out, after.totals.num_out) == (4, 5)
    assert after.contents != before.contents
    assert (found.record.directory / "a.txt").read_text() == "ingestagain"  # it saw its receipt


def test_units_without_a_receipt_are_done_as_in_any_run(
    ledger: Ledger,
    demo_recipe: Recipe,
    tmp_path: Path,
    use_stages: Callable[..., None],
    run_here: list[str],
) -> None:
    """Also where nothing was rejected."""
    folder = reject(tmp_path / "reasons", {})
    use_stages(Fetching(name="ingest", units=("a", "b"), reasons=folder))
    in_process.run_recipe(demo_recipe, ledger)
    (found,) = stages_of(ledger, "ingest")
    found.record.forget("b")
    (one,) = prepare_retry(ledger, "ingest", demo_recipe, only_failed=True)
    one.run()
    assert found.record.is_complete
    assert list(one.changes()) == []


def test_there_must_be_something_to_retry(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> None:
    """A stage that the recipe lacks, or that never ran, is named."""
    use_stages(FakeStage(name="ingest"))
    with pytest.raises(UserError, match="no stage 'embed' in this recipe"):
        prepare_retry(ledger, "embed", demo_recipe, only_failed=True)
    with pytest.raises(UserError, match="nothing was done yet"):
        prepare_retry(ledger, "ingest", demo_recipe, only_failed=True)


def test_ray_does_exactly_the_units_to_retry(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None], ray_cluster: None
) -> None:
    """The manifest of a finished stage stands until the first of them is done, then again."""
    use_stages(FakeStage(name="ingest", units=("a", "b")))
    (planned,) = plan(demo_recipe, ledger)
    finish(planned, {"a": {"a.txt": "old"}, "b": {"b.txt": "old"}})
    before = planned.record.manifest()
    (planned,) = plan(demo_recipe, ledger)
    with Progress() as progress:
        runner = Runner(
            demo_recipe,
            ledger,
            [planned],
            run_id="run-2",
            tracker=MagicMock(),
            progress=progress,
            retry={"ingest": frozenset({"b"})},
        )
        runner.run()
    assert (planned.record.directory / "a.txt").read_text() == "old"
    assert (planned.record.directory / "b.txt").read_text() == "ingest/b"
    after = planned.record.manifest()
    assert after.contents != before.contents
    assert (runner.states["ingest"].num_kept, runner.states["ingest"].num_done) == (1, 2)
