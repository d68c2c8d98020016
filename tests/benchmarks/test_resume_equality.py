"""How a resumed run is held against an undisturbed one."""

import json
from pathlib import Path

import pytest

from benchmarks import resume_problem
from benchmarks.peers import ours_training
from benchmarks.resume_equality import COMPARED_STEPS, KILL_STEPS, Difference, difference
from benchmarks.resume_problem import Diary, Step, read_diaries
from ediffi.shards import JoinedShards


def steps(first: int, num: int = COMPARED_STEPS) -> dict[int, Step]:
    """Steps with one picture each and a loss that falls by a tenth a step."""
    return {step: Step((f"p{step}",), 10 - step / 10) for step in range(first, first + num)}


def test_equal_steps_have_no_difference() -> None:
    """Only the first steps after the resume are compared, and with those of the same number."""
    later = {99: Step(("another",), 0.0)}
    assert difference(steps(1, 40) | later, steps(21) | later) == Difference(0, 0.0)


def test_pictures_and_losses_are_told_apart() -> None:
    """A step may hold the same pictures under other noise: the loss alone differs."""
    resumed = steps(21)
    resumed[23] = Step(("another",), resumed[23].loss)
    resumed[25] = Step(resumed[25].pictures, resumed[25].loss + 0.25)
    found = difference(steps(1, 40), resumed)
    assert found.unequal_steps == 1
    assert found.largest_loss == pytest.approx(0.25)


def test_too_short_a_run_is_refused() -> None:
    """A resume near the end leaves nothing to compare."""
    with pytest.raises(ValueError, match="only 3 were trained"):
        difference(steps(1, 40), steps(21, 3))


def test_ranks_of_a_batch_are_joined(tmp_path: Path) -> None:
    """The pictures of a step are those of all ranks, in no order; its loss is rank 0's."""
    paths = [tmp_path / "0", tmp_path / "1"]
    for rank, path in enumerate(paths):
        Diary(path, kill_step=0).add(1, [f"{1 - rank}"], loss=rank)
    assert read_diaries(paths) == {1: Step(("0", "1"), 0.0)}


def test_kills_leave_steps_to_compare() -> None:
    """Every kill comes after a checkpoint, with the compared steps between it and the end."""
    assert KILL_STEPS.start > resume_problem.CHECKPOINT_STEPS
    last_checkpoint = KILL_STEPS[-1] // resume_problem.CHECKPOINT_STEPS
    resumed_from = last_checkpoint * resume_problem.CHECKPOINT_STEPS
    assert resumed_from + COMPARED_STEPS <= resume_problem.TOTAL_STEPS


def test_pictures_are_noted_in_the_order_of_reading(tmp_path: Path, monkeypatch) -> None:
    """What our side notes are the keys of the pictures that the loader asked for."""
    monkeypatch.setattr(JoinedShards, "__getitems__", JoinedShards.__getitems__)  # to be put back
    resume_problem.write_pictures(tmp_path / "pictures")
    shards = JoinedShards(resume_problem.shards(tmp_path / "pictures"), image_px=16)
    read = ours_training._record_reads()

    samples = shards.__getitems__([105, 3])

    assert read == [sample.key for sample in samples] == ["1-005", "0-003"]


def test_diary_is_whole_before_the_kill(tmp_path: Path, monkeypatch) -> None:
    """The line of the step after which a process kills itself is on the disk by then."""
    seen: list[dict[str, object]] = []
    path = tmp_path / "diary"

    def kill(pid: int, signal: int) -> None:
        seen.append(json.loads(path.read_text().splitlines()[-1]))

    monkeypatch.setattr(resume_problem.os, "kill", kill)
    diary = Diary(path, kill_step=2)
    for step in (1, 2):
        diary.add(step, ["a"], 0.5)
    assert seen == [{"step": 2, "pictures": ["a"], "loss": 0.5}]
