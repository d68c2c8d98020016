"""Tests of pipelines.prediction.forecast: the runner's decisions, told before it takes them."""

from collections.abc import Callable, Mapping

import pytest

from pipelines.planning import plan
from pipelines.prediction.forecast import NUM_UNITS_SHOWN, Forecast, forecast, samples_in
from pipelines.recipe import Recipe
from pipelines.stage import Manifest, Unit
from pipelines.store.fingerprint import unit_key
from pipelines.store.ledger import Ledger
from tests.pipelines import in_process
from tests.pipelines.fake_stages import FakeStage

Keys = Mapping[str, str]


def keys(**captions: int) -> dict[str, str]:
    return {unit: unit_key("settings", captions=value) for unit, value in captions.items()}


def look(ledger: Ledger, recipe: Recipe, name: str = "embed/t5") -> Forecast:
    planned = {one.name: one for one in plan(recipe, ledger)}
    manifests = {
        one.name: one.record.manifest() for one in planned.values() if one.record.is_complete
    }
    return forecast(planned[name], manifests, ledger, shard_images=0)


def stages(of_units: Keys, *, ingest: int = 0, setting: int = 0) -> tuple[FakeStage, FakeStage]:
    return (
        FakeStage(name="ingest", setting=ingest, units=(f"list {ingest}",)),
        FakeStage(
            name="embed/t5",
            needs=("ingest",),
            units=tuple(of_units),
            keys=of_units,
            setting=setting,
        ),
    )


def test_what_was_never_done_is_to_do(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> None:
    """Without a reason: nothing has changed. The first few are named."""
    use_stages(*stages(keys(**{f"u{index}": 1 for index in range(9)})))
    in_process.run_recipe(demo_recipe, ledger, selected=["ingest"])
    found = look(ledger, demo_recipe)
    assert (found.num_kept, found.num_taken_over, found.num_to_do) == (0, 0, 9)
    assert found.first == [(f"u{index}", "") for index in range(NUM_UNITS_SHOWN)]


def test_units_of_an_unfinished_stage_are_kept(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> None:
    """As long as its inputs hold what they held."""
    use_stages(*stages(keys(a=1, b=1)))
    in_process.run_recipe(demo_recipe, ledger)
    planned = plan(demo_recipe, ledger)[1]
    planned.record.forget("b")
    found = look(ledger, demo_recipe)
    assert (found.num_kept, found.num_to_do, found.first) == (1, 1, [("b", "")])


@pytest.mark.parametrize("is_finished", [True, False])
def test_units_of_an_earlier_fingerprint_are_taken_over_by_key(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None], is_finished: bool
) -> None:
    """Those with another key are to do, and what changed is named; so does the run decide."""
    use_stages(*stages(keys(a=1, b=1, c=1)))
    in_process.run_recipe(demo_recipe, ledger)
    if not is_finished:
        (plan(demo_recipe, ledger)[1].record.directory / "manifest.json").unlink()
    use_stages(*stages(keys(a=1, b=2, d=1), ingest=1))
    in_process.run_recipe(demo_recipe, ledger, selected=["ingest"])
    found = look(ledger, demo_recipe)
    assert (found.num_kept, found.num_taken_over, found.num_to_do) == (0, 1, 2)
    assert found.first == [("b", "captions changed"), ("d", "")]
    in_process.run_recipe(demo_recipe, ledger)
    record = plan(demo_recipe, ledger)[1].record
    receipts = [record.receipt(unit) for unit in "abd"]
    assert [bool(one and one.taken_from) for one in receipts] == [True, False, False]


def test_units_are_judged_by_key_when_an_input_was_redone(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> None:
    """The stage keeps its fingerprint, but its receipts are trusted no longer."""
    use_stages(*stages(keys(a=1, b=1)))
    in_process.run_recipe(demo_recipe, ledger)
    planned = plan(demo_recipe, ledger)
    contents: Manifest = planned[0].record.manifest()
    use_stages(*stages(keys(a=1, b=2)))
    path = planned[0].record.directory / "manifest.json"
    path.write_text(path.read_text().replace(contents.contents, "f" * 64))
    found = look(ledger, demo_recipe)
    assert (found.num_kept, found.num_to_do) == (1, 1)
    assert found.first == [("b", "captions changed")]


@pytest.mark.parametrize(
    ("stage", "unit", "num_samples", "num_unsized"),
    [
        ("embed/t5", Unit(id="a", arguments={"num_samples": 7}), 7, 0),
        ("ingest", Unit(id="a", arguments={"start": 0, "stop": 1200}), 1000, 0),
        ("ingest", Unit(id="a", arguments={"start": 1000, "stop": 1200}), 200, 0),
        ("ingest", Unit(id="a", arguments={"place": "x.tar"}), 0, 1),
        ("embed/t5", Unit(id="null"), 0, 0),
        ("mine", Unit(id="a", arguments={"stop": 3}), 0, 1),
        ("mine", Unit(id="a", arguments={"num_samples": "many"}), 0, 1),
    ],
)
def test_samples_are_counted_as_far_as_a_unit_tells(
    stage: str, unit: Unit, num_samples: int, num_unsized: int
) -> None:
    """A shard to encode knows them, a slice of a list the most it can be, a tar elsewhere none.

    A user's own stage may give its units any arguments.
    """
    found = Forecast()
    found.add(unit, "", samples_in(stage, unit, 1000))
    assert (found.num_samples_to_do, found.num_unsized) == (num_samples, num_unsized)
