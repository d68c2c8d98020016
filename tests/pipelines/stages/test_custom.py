"""Tests of pipelines.stages.custom: whatever a user's class does, they are told where it failed.

The stages are worked on as a run does it, but for Ray.
"""

from __future__ import annotations

import errno
import importlib
from pathlib import Path
from typing import Any

import pytest

from pipelines.driver.stage_state import StageState
from pipelines.driver.stage_work import StageWork
from pipelines.errors import RetryableError, StageFailed, UserError
from pipelines.planning import PlannedStage
from pipelines.recipe import Resources
from pipelines.recipe_sections.custom import CustomStage
from pipelines.stage import Outcome, Unit
from pipelines.stages.custom import Custom
from pipelines.store.fingerprint import fingerprint
from pipelines.store.ledger import Ledger

CODE = """
import errno
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pipelines.errors import StageFailed
from pipelines.stage import Unit

ASKED = []  # how often the plan was asked for

@dataclass(frozen=True)
class Good:
    config: Mapping[str, object]
    version = 1
    def plan(self, inputs): return [Unit(id="a"), Unit(id="b")]
    def run(self, unit, workspace): return None

class Asserts(Good):
    def plan(self, inputs): assert inputs
class Texts(Good):
    def plan(self, inputs): return ["a"]
class Ids(Good):
    def plan(self, inputs): return [Unit(id=one) for one in self.config["ids"]]
class Moody(Good):
    def plan(self, inputs):
        ASKED.append(1)
        return [Unit(id=f"unit-{len(ASKED)}")]
class Shrinks(Good):
    def plan(self, inputs):
        ASKED.append(1)
        return [Unit(id="a"), Unit(id="b")] if len(ASKED) < 3 else [Unit(id="a")]
class Checks(Good):
    def check(self, receipts): {}[next(iter(receipts)).unit]
class Judges(Good):
    def check(self, receipts): raise StageFailed("too few")
class Amends(Good):
    def amend(self, receipts, directory): return ["a"]
class Again(Good):
    def amend(self, receipts, directory): return [Unit(id="b")]
class Named(Good):
    def identity(self): return {"place": Path("here")}
class Unversioned(Good):
    version = None
class Disk(Good):
    def plan(self, inputs): raise OSError(errno.EIO, "Input/output error")
@dataclass(frozen=True)
class Picky(Good):
    def __post_init__(self): raise RuntimeError("not today")
"""


@pytest.fixture
def module(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """The name of this test's own module: what a process has imported stays."""
    name = "own_" + "".join(c if c.isalnum() else "_" for c in request.node.name)
    (tmp_path / f"{name}.py").write_text(CODE)
    return name


@pytest.fixture
def make(module: str, tmp_path: Path) -> Any:
    """Call it with a class and its config to get the stage."""

    def of(name: str, **config: object) -> Custom:
        section = {"class": f"{module}:{name}", "path": str(tmp_path), "config": config}
        return Custom.of("mine", CustomStage.model_validate(section), ())

    return of


@pytest.fixture
def begin(make: Any, ledger: Ledger) -> Any:
    """Call it as `make` to get the stage begun, and who works on it."""

    def of(name: str, **config: object) -> tuple[StageWork, StageState]:
        stage = make(name, **config)
        address = fingerprint(stage, {})
        planned = PlannedStage(
            stage=stage,
            fingerprint=address,
            inputs={},
            record=ledger.stage("mine", address),
            reasons=("never run",),
        )
        state = StageState(planned=planned, resources=Resources())
        work = StageWork(ledger=ledger, run_id="run-1", retry={})
        work.open(state)
        return work, state

    return of


def do_all(state: StageState, scratch: Path) -> None:
    """Publish every unit that waits, without files."""
    while state.has_next():
        unit = state.queue.popleft().unit
        state.planned.record.publish(unit, Outcome(), scratch, seconds=1.0, attempt=1)


def test_an_error_without_words_is_told_with_its_kind_and_place(make: Any, module: str) -> None:
    """A bare assertion says nothing else."""
    with pytest.raises(UserError) as caught:
        list(make("Asserts").plan({}))
    line = next(n for n, text in enumerate(CODE.split("\n"), 1) if "assert inputs" in text)
    assert str(caught.value).startswith("custom_stages.mine: plan: AssertionError (")
    assert str(caught.value).endswith(f"{module}.py:{line})")


def test_what_is_no_unit_is_refused(make: Any) -> None:
    """In a plan, and among what shall be done again."""
    with pytest.raises(UserError, match=r"custom_stages\.mine: plan: must give units, .*got 'a'"):
        list(make("Texts").plan({}))
    amend = make("Amends").amend
    assert amend is not None
    with pytest.raises(UserError, match=r"custom_stages\.mine: amend: must give units"):
        amend([], Path())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Named", r"custom_stages\.mine: identity: TypeError: .*PosixPath is not JSON"),
        ("Unversioned", r"custom_stages\.mine: version: TypeError: .*None"),
        ("Picky", r"custom_stages\.mine: version: RuntimeError: not today"),
    ],
)
def test_what_a_fingerprint_is_made_of_is_guarded(make: Any, name: str, words: str) -> None:
    """Planning ends with the recipe's field, not with a traceback."""
    with pytest.raises(UserError, match=words):
        fingerprint(make(name), {})


def test_a_disk_that_fails_is_not_the_users_error(make: Any) -> None:
    """It passes, for who knows the store to tell: the same command may go on."""
    with pytest.raises(OSError, match="Input/output") as caught:
        list(make("Disk").plan({}))
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (["../../evil"], r"mine: plan: the id of a unit must .*got '\.\./\.\./evil'"),
        (["x/y"], "got 'x/y'"),
        ([""], "got ''"),
        ([".hidden"], "got '.hidden'"),
        ([3], "got 3"),
        (["a", "b", "a"], "mine: plan: each unit must have an id of its own, but two have 'a'"),
    ],
)
def test_ids_that_are_no_names_are_refused(begin: Any, ids: list[object], words: str) -> None:
    """Before any unit is done: receipts, logs and fences are named after them."""
    with pytest.raises(UserError, match=words):
        begin("Ids", ids=ids)


@pytest.mark.parametrize("name", ["Moody", "Shrinks"])
def test_a_plan_that_changes_is_told(begin: Any, module: str, name: str, tmp_path: Path) -> None:
    """It is no bug of ours, and no manifest is written of half the units."""
    work, state = begin(name)
    do_all(state, tmp_path)
    with pytest.raises(UserError, match=r"custom_stages\.mine: plan must list the same units"):
        work.complete(state)
    assert not state.planned.record.is_complete
    assert len(importlib.import_module(module).ASKED) > 2


def test_a_receipt_that_is_gone_is_made_again(begin: Any, tmp_path: Path) -> None:
    """Somebody removed it while the run went on: the same command does the unit."""
    work, state = begin("Good")
    do_all(state, tmp_path)
    state.planned.record.forget("b")
    with pytest.raises(RetryableError, match="unit b was done, but its receipt is not there"):
        work.complete(state)


def test_a_check_that_breaks_fails_its_stage(begin: Any, tmp_path: Path) -> None:
    """Its error is told as the recipe's; its judgement of the receipts stays what it is."""
    work, state = begin("Checks")
    do_all(state, tmp_path)
    with pytest.raises(UserError, match=r"custom_stages\.mine: check: KeyError: 'a' \("):
        work.complete(state)
    work, state = begin("Judges")
    do_all(state, tmp_path)
    with pytest.raises(StageFailed, match="too few"):
        work.complete(state)


def test_units_that_are_done_again_keep_their_key(begin: Any, tmp_path: Path) -> None:
    """One without a key of its own belongs to the contents of the inputs, now as before."""
    work, state = begin("Again")
    keys = {unit.id: unit.key for unit in work.units(state.planned)}
    do_all(state, tmp_path)
    assert work.amend(state)
    assert [task.unit for task in state.queue] == [Unit(id="b", key=keys["b"])]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("manifest.json", "an outcome cannot have a file 'manifest.json'"),
        ("./receipts/a.json", "the store keeps receipts of the stage itself there"),
        ("lease/00000009.json", "the store keeps lease"),
        ("../elsewhere.txt", "must lie in workspace.scratch"),
        ("/etc/passwd", "must lie in workspace.scratch"),
    ],
)
def test_files_leave_the_stages_own_alone(
    begin: Any, tmp_path: Path, name: str, words: str
) -> None:
    """An outcome replaces neither the stage's records nor anything outside its folder."""
    _, state = begin("Good")
    unit = Unit(id="a")
    with pytest.raises(UserError, match=words):
        state.planned.record.publish(unit, Outcome(files=[name]), tmp_path, seconds=1.0, attempt=1)
    assert state.planned.record.done_units() == set()
