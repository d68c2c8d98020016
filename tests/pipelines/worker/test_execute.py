"""Tests of pipelines.worker.execute: one unit from task to receipt, and the rows it reports."""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest

from ediffi.train.stop import Stopped
from pipelines.planning import PlannedStage, plan
from pipelines.recipe import Recipe
from pipelines.stage import Unit
from pipelines.store import lease
from pipelines.store.lease import Fenced
from pipelines.store.ledger import Ledger
from pipelines.store.processes import Owner
from pipelines.store.stopping import StopMark
from pipelines.worker.durable import read_progress, read_reports
from pipelines.worker.execute import Task, execute
from tests.pipelines.fake_stages import FakeStage, attempts, finish


@pytest.fixture
def task_of(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> Callable[..., Task]:
    """Call it with stages to get the task of unit `a` of the last; the others are finished."""

    def make(*stages: FakeStage, attempt: int = 1) -> Task:
        use_stages(*stages)
        *before, last = plan(demo_recipe, ledger)
        for one in before:
            finish(one)
        return task(ledger, last, attempt)

    return make


def task(ledger: Ledger, planned: PlannedStage, attempt: int) -> Task:
    return Task(
        store=str(ledger.store),
        stage=planned.stage,
        fingerprint=planned.fingerprint,
        inputs=planned.inputs,
        unit=Unit(id="a"),
        attempt=attempt,
    )


def scratches(task: Task) -> list[Path]:
    return list((Path(task.store) / ".scratch").rglob("?" * 32))


def test_a_unit_is_published_and_its_scratch_is_gone(task_of: Callable[..., Task]) -> None:
    """The named file lies in the store; what the outcome did not name has vanished."""
    one = task_of(FakeStage(name="first"), FakeStage(name="second", needs=("first",)), attempt=3)
    receipt = execute(one)
    assert receipt is not None
    assert (receipt.unit, receipt.attempt, receipt.num_in, receipt.num_out) == ("a", 3, 2, 1)
    assert (one.record.directory / "a.txt").read_text() == "second/a"
    assert not list(one.record.directory.rglob("left-over.txt"))
    assert scratches(one) == []


def test_a_unit_that_is_done_is_not_done_again(task_of: Callable[..., Task]) -> None:
    """A second worker with the same task gives the receipt that is there."""
    one = task_of(FakeStage(name="first"))
    assert execute(one) == execute(one)
    assert attempts(one.record, "a") == [os.getpid()]


def test_a_failed_unit_leaves_no_receipt_and_no_scratch(task_of: Callable[..., Task]) -> None:
    """What was not finished is not half there; the next attempt succeeds."""
    broken = task_of(FakeStage(name="first", behaviour={"a": "fails once"}))
    with pytest.raises(RuntimeError, match="a is unlucky"):
        execute(broken)
    assert broken.record.receipt(broken.unit.id) is None
    assert scratches(broken) == []
    again = task_of(FakeStage(name="first"), attempt=2)
    assert again.record == broken.record
    assert execute(again) is not None
    assert len(attempts(again.record, "a")) == 2


def test_only_rank_0_publishes_and_keeps_progress(task_of: Callable[..., Task]) -> None:
    """Every rank of a gang does the work and tells its rows; one receipt and one file come out."""
    one = task_of(FakeStage(name="first"))
    told: list[Mapping[str, float]] = []
    assert execute(one, rank=1, world_size=2, tell=told.append) is None
    assert one.record.receipt(one.unit.id) is None
    assert read_progress(one.durable_path) == []
    assert scratches(one) == []
    assert execute(one, rank=0, world_size=2, tell=told.append) is not None
    rows = [{"images": 1, "loss": 1.0}, {"images": 2, "loss": 0.5}]
    assert told == rows * 2
    assert read_progress(one.durable_path) == rows


def test_what_training_warns_of_becomes_a_notice(task_of: Callable[..., Task]) -> None:
    """On rank 0, where people will read it; nothing listens to the log any more afterwards."""
    stage = FakeStage(name="first", behaviour={"a": "warns"})
    one = task_of(stage)
    execute(one, rank=1, world_size=2)
    assert read_reports(one.durable_path).notices == []
    execute(one)
    assert read_reports(one.durable_path).notices == ["one is damaged"]
    assert logging.getLogger("ediffi.train").handlers == []


def test_a_unit_hears_the_word_of_its_run(task_of: Callable[..., Task]) -> None:
    """It keeps its state and says so; nothing is published, and the next attempt goes on."""
    one = replace(task_of(FakeStage(name="first", behaviour={"a": "trains once"})), run_id="run-1")
    StopMark(Ledger.at(one.store).store, "run-1").put()
    with pytest.raises(Stopped, match="after 7 images"):
        execute(one)
    assert one.record.receipt("a") is None
    assert scratches(one) == []
    assert execute(one) is not None


def test_a_unit_sees_the_manifests_of_what_its_stage_needs(task_of: Callable[..., Task]) -> None:
    """Inputs are found by address; one that is not finished is an error, never an empty input."""
    one = task_of(FakeStage(name="first"), FakeStage(name="second", needs=("first",)))
    (ledger_of_first,) = Ledger.at(one.store).manifests("first")
    (ledger_of_first.directory / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError):
        execute(replace(one, stage=FakeStage(name="second", behaviour={"a": "reads first"})))


def test_a_unit_of_a_lost_stage_is_not_begun(task_of: Callable[..., Task]) -> None:
    """The worker finds the lease taken over before it does anything."""
    one = task_of(FakeStage(name="first"))
    owner = Owner.of_this_process("run-1")
    lost = lease.take(one.record.directory, owner)
    lost.release()
    with lease.take(one.record.directory, owner) as held:
        with pytest.raises(Fenced):
            execute(replace(one, token=lost.token))
        assert attempts(one.record, "a") == []
        assert execute(replace(one, token=held.token)) is not None


def test_training_is_broken_off_when_its_stage_is_lost(task_of: Callable[..., Task]) -> None:
    """At its next look, before it saves: two would write into one folder of checkpoints."""
    stage = FakeStage(name="first", behaviour={"a": "trains"})
    one = task_of(stage)
    owner = Owner.of_this_process("run-1")
    held = lease.take(one.record.directory, owner)
    newer: list[lease.Lease] = []

    def take_over() -> None:
        while not (one.durable_path / "trains").exists():
            time.sleep(0.05)
        held.release()
        newer.append(lease.take(one.record.directory, owner))

    thread = Thread(target=take_over)
    thread.start()
    with pytest.raises(Fenced):
        execute(replace(one, token=held.token))
    thread.join()
    newer[0].release()
    assert not (one.durable_path / "saved").exists()
    assert scratches(one) == []


def test_a_unit_given_out_again_is_not_published_by_the_first(task_of: Callable[..., Task]) -> None:
    """The first worker was only cut off; the second may."""
    one = task_of(FakeStage(name="first"))
    with lease.take(one.record.directory, Owner.of_this_process("run-1")) as held:
        lease.fence(one.record.directory, "a", 2, token=held.token)
        with pytest.raises(Fenced, match="given out again after attempt 1"):
            execute(replace(one, token=held.token))
        receipt = execute(replace(one, token=held.token, attempt=2))
        assert receipt is not None
        assert receipt.attempt == 2


def write(path: Path, *rows: Mapping[str, float]) -> None:
    path.write_text("".join("\n" + json.dumps(row) for row in rows))


def test_rows_that_a_resumed_attempt_has_overtaken_are_dropped(tmp_path: Path) -> None:
    """An attempt that resumes at an earlier checkpoint repeats rows: the newer ones count."""
    path = tmp_path / "progress.jsonl"
    write(path, *({"images": images, "try": 1} for images in (1, 2, 3, 4)), {"images": 3, "try": 2})
    assert read_progress(tmp_path) == [
        {"images": 1, "try": 1},
        {"images": 2, "try": 1},
        {"images": 3, "try": 2},
    ]


def test_a_torn_last_row_is_left_out(tmp_path: Path) -> None:
    """A worker that died while writing costs its last row and nothing else."""
    path = tmp_path / "progress.jsonl"
    write(path, {"images": 1}, {"images": 2})
    path.write_text(path.read_text()[:-3])
    assert read_progress(tmp_path) == [{"images": 1}]


def test_a_torn_row_does_not_swallow_the_next(task_of: Callable[..., Task]) -> None:
    """The attempt after a kill begins on a line of its own."""
    one = task_of(FakeStage(name="first"))
    path = Path(str(one.durable_path)) / "progress.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('\n{"images": 1, "loss": 3.0}\n{"images": 2, "lo')
    execute(one)
    assert [row["loss"] for row in read_progress(one.durable_path)] == [1.0, 0.5]


def test_rows_without_images_are_all_kept(tmp_path: Path) -> None:
    """Only the count of images says that a row was overtaken."""
    path = tmp_path / "progress.jsonl"
    write(path, {"loss": 1.0}, {"loss": 2.0}, {"images": 5}, {"loss": 3.0})
    assert len(read_progress(tmp_path)) == 4


def test_a_unit_that_reported_nothing_has_no_rows(tmp_path: Path) -> None:
    """No file is no progress."""
    assert read_progress(tmp_path) == []
