"""Tests of pipelines.caches.lookup: what a name, a fingerprint or a run id leads to."""

from collections.abc import Callable

import pytest

from pipelines.caches.lookup import Found, RecipeFinder, only_stage, stages_of, stages_of_run
from pipelines.errors import UserError
from pipelines.planning import PlannedStage, plan
from pipelines.recipe import Recipe
from pipelines.store.ledger import Ledger
from tests.pipelines.fake_stages import FakeStage, finish, write_run


@pytest.fixture
def planned(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> dict[str, PlannedStage]:
    """A store with `ingest` and two encoders."""
    use_stages(
        FakeStage(name="ingest"),
        FakeStage(name="embed/t5", needs=("ingest",)),
        FakeStage(name="embed/clip", needs=("ingest",)),
    )
    planned = {one.name: one for one in plan(demo_recipe, ledger)}
    for one in planned.values():
        finish(one, {"a": {"a.txt": one.name}})
    return planned


def names(found: list[Found]) -> list[str]:
    return [one.name for one in found]


def test_a_stage_is_found_by_its_name_or_its_fingerprint(
    ledger: Ledger, planned: dict[str, PlannedStage]
) -> None:
    """`embed` names all encoders; the beginning of a fingerprint will do, with the name or not."""
    t5 = planned["embed/t5"].fingerprint
    assert names(stages_of(ledger)) == ["embed/clip", "embed/t5", "ingest"]
    assert names(stages_of(ledger, "embed")) == ["embed/clip", "embed/t5"]
    assert names(stages_of(ledger, "embed/t5")) == ["embed/t5"]
    for text in (t5, t5[:6], f"embed/t5/{t5[:4]}"):
        assert names(stages_of(ledger, text)) == ["embed/t5"]


@pytest.mark.parametrize("text", ["nope", "ing", "ingest/ffff", "00"])
def test_what_is_not_there_is_answered_with_what_is(
    ledger: Ledger, planned: dict[str, PlannedStage], text: str
) -> None:
    """Neither part of a name nor a wrong fingerprint is guessed at."""
    with pytest.raises(UserError, match=f"{text}.*it has the stages embed/clip, embed/t5, ingest"):
        stages_of(ledger, text)


def test_an_empty_store_says_how_to_fill_it(ledger: Ledger) -> None:
    """All of nothing is nothing; something by name is an error."""
    assert stages_of(ledger) == []
    with pytest.raises(UserError, match="fill it with `ediffi run` or `ediffi embed`"):
        stages_of(ledger, "ingest")


def test_one_of_several_is_not_guessed(ledger: Ledger, planned: dict[str, PlannedStage]) -> None:
    """An ambiguous word lists what it may mean."""
    assert only_stage(ledger, "ingest").name == "ingest"
    with pytest.raises(UserError, match=r"'embed' names 2 stages.*embed/clip/.*, embed/t5/"):
        only_stage(ledger, "embed")


def test_stages_of_a_run_are_those_of_its_record(
    ledger: Ledger, planned: dict[str, PlannedStage]
) -> None:
    """Also of one that has only just planned them; absent ones are left out."""
    rows = [{"name": "ingest", "fingerprint": planned["ingest"].fingerprint}]
    gone = {"name": "base", "fingerprint": "0000"}
    record = write_run(ledger, "run-1", stages=[*rows, gone])
    assert list(stages_of_run(ledger, record)) == ["ingest"]
    fingerprints = {name: one.fingerprint for name, one in planned.items()}
    record = write_run(ledger, "run-2", planned=fingerprints)
    assert list(stages_of_run(ledger, record)) == ["ingest", "embed/t5", "embed/clip"]


def test_the_recipe_of_a_stage_is_one_that_still_gives_its_fingerprint(
    ledger: Ledger,
    planned: dict[str, PlannedStage],
    demo_recipe: Recipe,
    use_stages: Callable[..., None],
) -> None:
    """Runs whose recipe cannot be read are passed over; without any the reason is told."""
    (found,) = stages_of(ledger, "ingest")
    write_run(ledger, "broken", resolved={"name": 3})
    with pytest.raises(UserError, match=r"no run in .* still gives.*broken: its recipe"):
        RecipeFinder(ledger).recipe_for(found)
    write_run(ledger, "good", resolved=demo_recipe.model_dump(mode="json"))
    assert RecipeFinder(ledger).recipe_for(found) == demo_recipe
    use_stages(FakeStage(name="ingest", setting="another"))
    with pytest.raises(UserError, match="what it was made from has changed"):
        RecipeFinder(ledger).recipe_for(found)


def test_receipts_of_an_unfinished_stage_are_those_that_are_there(
    ledger: Ledger, planned: dict[str, PlannedStage]
) -> None:
    """A finished stage has them gathered, an unfinished one has a file each."""
    (found,) = stages_of(ledger, "ingest")
    assert [one.unit for one in found.receipts()] == ["a"]
    (found.record.directory / "manifest.json").unlink()
    assert found.manifest() is None
    assert [one.unit for one in found.receipts()] == ["a"]


def test_a_damaged_manifest_is_named(ledger: Ledger, planned: dict[str, PlannedStage]) -> None:
    """Whatever is wrong with it, it is one kind of error."""
    (found,) = stages_of(ledger, "ingest")
    path = found.record.directory / "manifest.json"
    for text in ("{}", "{", '{"format": 2}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            found.manifest()
