"""Tests of pipelines.driver.runner, pool and execute on a real Ray, with stages that misbehave."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from unittest.mock import Mock, call, create_autospec

import pytest
import ray

from pipelines.driver.progress import Progress
from pipelines.driver.runner import Runner
from pipelines.driver.stage_state import StageState
from pipelines.errors import RetryableError, StageFailed, UserError
from pipelines.planning import plan
from pipelines.recipe import Recipe, Resources
from pipelines.stage import Outcome, Receipt, Unit, Workspace
from pipelines.store.ledger import Ledger
from pipelines.store.stopping import Interruption
from pipelines.tracking.tracker import Tracker
from tests.pipelines.fake_stages import FakeStage, attempts, finish

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(120)]


@dataclass
class Told:
    """A run that is over: its stages, its error, and what tracker and terminal were told.

    `attempts` has the process of every attempt so far, by `stage/unit`.
    """

    states: Mapping[str, StageState]
    tracker: Mock
    said: list[str]
    attempts: Mapping[str, list[int]]
    error: Exception | None

    @property
    def ends(self) -> dict[str, str]:
        return {name: state.state for name, state in self.states.items()}


def drive(
    recipe: Recipe,
    ledger: Ledger,
    resources: Mapping[str, Resources],
    *stages: FakeStage,
    interruption: Interruption | None = None,
    run_id: str = "run-1",
    busy: Literal["wait", "leave"] = "wait",
) -> Told:
    """Run these stages to their end."""
    recipe = recipe.model_copy(update={"resources": resources})
    tracker, progress = create_autospec(Tracker, instance=True), create_autospec(Progress)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.planning.build_stages", lambda recipe: list(stages))
        planned = plan(recipe, ledger)
    one = Runner(
        recipe,
        ledger,
        planned,
        run_id=run_id,
        tracker=tracker,
        progress=progress,
        interruption=interruption,
        busy=busy,
    )
    error: Exception | None = None
    try:
        one.run()
    except (StageFailed, UserError, RetryableError) as caught:
        error = caught
    said = [said.args[0] for said in progress.say.call_args_list]
    tried = {
        f"{name}/{unit}": attempts(state.planned.record, unit)
        for name, state in one.states.items()
        for unit in state.planned.stage.units
    }
    return Told(states=one.states, tracker=tracker, said=said, attempts=tried, error=error)


def troubled(**repaired: Mapping[str, str]) -> list[FakeStage]:
    """A graph in which nearly everything that can go wrong does, but for what is repaired."""
    behaviour = {
        "lucky": {"b": "fails once", "c": "dies once"},
        "broken": {"x": "fails"},
        "wrong": {"v": "refuses", "u": "refuses as user"},
        **repaired,
    }
    graph = {
        "lucky": ((), ("a", "b", "c")),
        "broken": (("lucky",), ("x", "y")),
        "wrong": (("lucky",), ("u", "v")),
        "after": (("broken",), ("a",)),
        "last": (("after",), ("a",)),
        "aside": (("lucky",), ("a",)),
    }
    return [
        FakeStage(name=name, needs=needs, units=units, behaviour=behaviour.get(name, {}))
        for name, (needs, units) in graph.items()
    ]


TWICE = Resources(attempts=2)


@pytest.fixture(scope="module")
def story(
    ray_cluster: None, demo_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Told]]:
    """The troubled graph, run; run again once it was repaired; and a third time."""
    ledger = Ledger.open(tmp_path_factory.mktemp("runner") / "store")
    resources = dict.fromkeys((stage.name for stage in troubled()), TWICE)
    told = {"first": drive(demo_recipe, ledger, resources, *troubled())}
    for name in ("second", "third"):
        told[name] = drive(demo_recipe, ledger, resources, *troubled(broken={}, wrong={}))
    return told


def test_every_stage_ends(story: dict[str, Told]) -> None:
    """Failures stay where they are: what does not need them is finished, what does is blocked."""
    assert story["first"].ends == {
        "lucky": "ran",
        "broken": "failed",
        "wrong": "failed",
        "after": "blocked",
        "last": "blocked",
        "aside": "ran",
    }


def test_a_unit_that_fails_once_is_tried_again(story: dict[str, Told]) -> None:
    """Its receipt says which attempt succeeded; its sibling was tried once."""
    told, record = story["first"], story["first"].states["lucky"].planned.record
    assert [record.manifest().receipt(unit).attempt for unit in "abc"] == [1, 2, 2]
    assert len(told.attempts["lucky/a"]) == 1
    said = "lucky/b: attempt 1 of 2 failed: RuntimeError: b is unlucky; tried again in "
    assert any(line.startswith(said) for line in told.said)


def test_a_unit_that_kills_its_worker_gets_a_fresh_one(story: dict[str, Told]) -> None:
    """The second attempt runs in another process; the other units lose nothing."""
    first, second = story["first"].attempts["lucky/c"]
    assert first != second
    said = f"lucky/c: attempt 1 of 2 failed: its worker process {first} on "
    (line,) = (line for line in story["first"].said if line.startswith(said))
    assert " died: " in line
    assert "\n" not in line


def test_a_unit_that_fails_for_good_fails_its_stage_after_its_siblings(
    story: dict[str, Told],
) -> None:
    """All attempts are used, and the sibling is published all the same: it is found later."""
    told = story["first"]
    assert len(told.attempts["broken/x"]) == 2
    assert told.states["broken"].failures["x"] == "RuntimeError: x is broken"
    assert story["second"].states["broken"].planned.reasons == (
        "unfinished: 1 units are done and will be kept",
    )


def test_a_wrong_input_is_not_tried_again(story: dict[str, Told]) -> None:
    """A ValueError or a UserError would only be raised once more."""
    told = story["first"]
    assert [len(told.attempts[f"wrong/{unit}"]) for unit in "uv"] == [1, 1]


def test_the_error_names_stages_units_and_what_each_said(story: dict[str, Told]) -> None:
    """What ends the run is the failures' own words, without Ray's."""
    error = story["first"].error
    assert isinstance(error, StageFailed)
    lines = set(str(error).splitlines())
    assert lines == {
        "stage broken: 1 of 2 units failed",
        "  x: RuntimeError: x is broken",
        "stage wrong: 2 of 2 units failed",
        "  u: UserError: u has a wrong input",
        "  v: ValueError: v has a wrong input",
    }


def test_the_tracker_hears_of_everything_in_order(story: dict[str, Told]) -> None:
    """Started, rows by unit, finished or failed: what MLflow shows is what happened."""
    tracker = story["first"].tracker
    started = [said.args[0].name for said in tracker.stage_started.call_args_list]
    assert started == ["lucky", "broken", "wrong", "aside"]
    assert {said.args[0] for said in tracker.stage_failed.call_args_list} == {"broken", "wrong"}
    manifest, curves = tracker.stage_finished.call_args_list[0].args
    assert manifest.stage == "lucky"
    rows = [{"images": 1, "loss": 1.0}, {"images": 2, "loss": 0.5}]
    assert curves == dict.fromkeys("abc", rows)
    assert call("aside", "", rows) in tracker.progress.call_args_list  # of one unit: the stage's
    told = [
        row
        for said in tracker.progress.call_args_list
        if said.args[:2] == ("lucky", "a")
        for row in said.args[2]
    ]
    assert told == rows


def test_the_same_command_goes_on_where_the_run_ended(story: dict[str, Told]) -> None:
    """Finished stages and units are found, failed ones done, blocked ones unblocked."""
    told = story["second"]
    assert told.error is None
    assert told.ends == {
        "lucky": "cached",
        "broken": "ran",
        "wrong": "ran",
        "after": "ran",
        "last": "ran",
        "aside": "cached",
    }
    assert told.states["broken"].num_kept == 1
    assert len(told.attempts["broken/y"]) == 1
    assert len(told.attempts["broken/x"]) == 3


def test_a_run_that_finds_everything_does_nothing(story: dict[str, Told]) -> None:
    """No unit is planned, no process asked; every stage is told as cached."""
    told = story["third"]
    assert set(told.ends.values()) == {"cached"}
    assert not any(state.num_done or state.num_kept for state in told.states.values())
    assert len(told.tracker.stage_cached.call_args_list) == 6
    assert not told.tracker.stage_started.called


@pytest.mark.parametrize("is_joined", [False, True])
@pytest.mark.parametrize("needs", [(), ("small",)], ids=["beside", "after"])
def test_idle_workers_make_room_for_another_shape(
    demo_recipe: Recipe,
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    needs: tuple[str, ...],
    is_joined: bool,
) -> None:
    """A stage whose units want the whole machine does not wait for ever for idle small workers."""
    monkeypatch.setattr("pipelines.driver.pool.is_joined", lambda: is_joined)
    every = ray.cluster_resources()["CPU"]
    stages = FakeStage(name="small", units=("a", "b", "c")), FakeStage(name="large", needs=needs)
    resources = {"small": TWICE, "large": Resources(cpus=every, start_deadline_s=60)}
    assert drive(demo_recipe, ledger, resources, *stages).ends == {"small": "ran", "large": "ran"}


def test_more_than_the_cluster_has_is_refused_at_once(demo_recipe: Recipe, ledger: Ledger) -> None:
    """A unit that can never be placed is an error before anything runs, not an endless wait."""
    every = ray.cluster_resources()["CPU"]
    stages = FakeStage(name="small"), FakeStage(name="large")
    told = drive(demo_recipe, ledger, {"large": Resources(cpus=every + 1)}, *stages)
    assert isinstance(told.error, UserError)
    assert "resources.large: a unit takes" in str(told.error)
    assert told.ends["small"] == "waiting"


def test_what_is_in_the_store_takes_no_resources(
    demo_recipe: Recipe, ledger: Ledger, use_stages: Callable[..., None]
) -> None:
    """A laptop may go on from stages that only a cluster could run."""
    stages = FakeStage(name="large"), FakeStage(name="small", needs=("large",))
    use_stages(*stages)
    finish(plan(demo_recipe, ledger)[0])
    told = drive(demo_recipe, ledger, {"large": Resources(gpus=64), "small": TWICE}, *stages)
    assert told.ends == {"large": "cached", "small": "ran"}


def test_a_stage_may_judge_its_receipts(demo_recipe: Recipe, ledger: Ledger) -> None:
    """All units are done, but a stage that finds too many rejects fails without a manifest."""

    class Judge(FakeStage):
        def check(self, receipts: Iterable[Receipt]) -> None:
            raise StageFailed(f"{len(list(receipts))} is too few")

    told = drive(demo_recipe, ledger, {"judge": TWICE}, Judge(name="judge"))
    assert told.ends == {"judge": "failed"}
    assert str(told.error) == "1 is too few"
    assert not told.states["judge"].planned.record.is_complete


def test_the_order_to_end_is_no_failure_of_a_unit(
    demo_recipe: Recipe, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM may arrive while a result is fetched: the run ends, nothing is tried again."""

    def told_to_end(reference: ray.ObjectRef) -> None:
        raise RetryableError("told to end")

    monkeypatch.setattr(ray, "get", told_to_end)
    told = drive(demo_recipe, ledger, {"first": TWICE}, FakeStage(name="first"))
    assert isinstance(told.error, RetryableError)
    assert told.said == []


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        ({"a": "dies"}, RetryableError),
        ({"a": "is cut off"}, RetryableError),
        ({"a": "dies", "b": "fails"}, StageFailed),
    ],
)
def test_an_outage_asks_for_another_try(
    demo_recipe: Recipe, ledger: Ledger, behaviour: dict[str, str], kind: type[Exception]
) -> None:
    """If only the surroundings failed the same command may succeed; one broken unit means no."""
    stage = FakeStage(name="first", units=("a", "b"), behaviour=behaviour)
    told = drive(demo_recipe, ledger, {"first": Resources(attempts=1)}, stage)
    assert type(told.error) is kind
    assert told.ends == {"first": "failed"}


def test_stages_leave_no_scratch_behind(story: dict[str, Told]) -> None:
    """But for the process that died midway, whose directory the next run's start clears."""
    store: Path = story["first"].states["lucky"].planned.record.directory.parents[1]
    assert len(list((store / ".scratch").iterdir())) == 1


def shards(**keys: str) -> FakeStage:
    """A stage of content-addressed units; its fingerprint changes with any key."""
    return FakeStage(name="shards", units=tuple(keys), setting=dict(keys), keys=keys)


def test_only_the_unit_whose_key_changed_is_done_again(demo_recipe: Recipe, ledger: Ledger) -> None:
    """The others are taken over from the earlier fingerprint, and the reason is said."""
    before = drive(demo_recipe, ledger, {}, shards(a="rows:1", b="rows:2", c="rows:3"))
    told = drive(demo_recipe, ledger, {}, shards(a="rows:1", b="rows:9", c="rows:3", d="rows:4"))
    state, record = told.states["shards"], told.states["shards"].planned.record
    assert record != before.states["shards"].planned.record
    assert (state.num_taken_over, state.reasons) == (2, {"b": "rows changed"})
    assert {unit: len(told.attempts[f"shards/{unit}"]) for unit in "abcd"} == {
        **{"a": 0, "b": 1, "c": 0, "d": 1}
    }
    assert "shards/b: done again: rows changed" in told.said
    assert [record.manifest().receipt(unit).reason for unit in "abcd"] == [
        "",
        "rows changed",
        "",
        "",
    ]


def test_a_donor_without_its_file_is_passed_over(demo_recipe: Recipe, ledger: Ledger) -> None:
    """What an earlier fingerprint has lost, or holds cut short, is made anew."""
    before = drive(demo_recipe, ledger, {}, shards(a="rows:1", b="rows:2", c="rows:3"))
    folder = before.states["shards"].planned.record.directory
    (folder / "a.txt").unlink()
    (folder / "b.txt").write_text("cut")
    told = drive(demo_recipe, ledger, {}, shards(a="rows:1", b="rows:2", c="rows:3", d="rows:4"))
    assert told.error is None
    assert told.states["shards"].num_taken_over == 1
    assert [len(told.attempts[f"shards/{unit}"]) for unit in "abcd"] == [1, 1, 0, 1]


def test_what_depends_on_an_input_that_was_redone_is_done_again(
    demo_recipe: Recipe, ledger: Ledger
) -> None:
    """Same fingerprints, other contents: keyed units are judged one by one, the others all go."""

    def graph(rows: str) -> list[FakeStage]:
        keys = {"a": f"rows:{rows}", "b": "rows:2"}
        embed = FakeStage(name="embed", needs=("ingest",), units=("a", "b"), keys=keys)
        return [FakeStage(name="ingest"), embed, FakeStage(name="base", needs=("embed",))]

    first = drive(demo_recipe, ledger, {}, *graph("1"))
    ingest = first.states["ingest"].planned.record
    path = ingest.directory / "receipts.jsonl"
    path.write_text(path.read_text().replace('"num_out":1', '"num_out":2'))
    retried = ingest.receipt("a")
    assert retried is not None
    ingest.forget("a")
    outcome = Outcome(num_in=2, num_out=2)
    ingest.publish(Unit(id="a", key=retried.key), outcome, ledger.store, seconds=0, attempt=1)
    told = drive(demo_recipe, ledger, {}, *graph("9"))
    assert told.ends == {"ingest": "ran", "embed": "ran", "base": "ran"}
    tries = {name: len(pids) for name, pids in told.attempts.items()}
    assert tries == {"ingest/a": 1, "embed/a": 1, "embed/b": 0, "base/a": 1}
    assert told.states["embed"].num_kept == 1
    assert "base/a: done again: inputs changed" in told.said


def test_a_stage_may_have_units_done_again_once_it_sees_all(
    demo_recipe: Recipe, ledger: Ledger
) -> None:
    """Amendments replace receipts before the manifest is written, and are asked for only once."""

    class Amended(FakeStage):
        def amend(self, receipts: Iterable[Receipt], directory: Path) -> list[Unit]:
            odd = [receipt.unit for receipt in receipts if receipt.key == "rows:odd"]
            return [Unit(id=unit, key="rows:even") for unit in odd]

        def run(self, unit: Unit, workspace: Workspace) -> Outcome:
            return replace(super().run(unit, workspace), facts={"key": unit.key})

    stage = Amended(name="amended", units=("a", "b"), keys={"a": "rows:even", "b": "rows:odd"})
    told = drive(demo_recipe, ledger, {}, stage)
    assert told.ends == {"amended": "ran"}
    facts = [receipt.facts for receipt in told.states["amended"].planned.record.manifest().receipts]
    assert facts == [{"key": "rows:even"}] * 2
    assert drive(demo_recipe, ledger, {}, stage).ends == {"amended": "cached"}
