"""Tests of pipelines.stages.ingestion.rejects and shard_digests."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from pipelines.errors import StageFailed
from pipelines.stage import Receipt, Unit
from pipelines.stages.ingestion.rejects import Rejection, Tally, check_budget, read_report
from pipelines.stages.ingestion.shard_digests import ShardDigests

UNIT = Unit(id="train-00000", arguments={"split": "train"})
NO_FILE = Rejection(reason="file_missing", message="no file")


def receipt(
    num_in: int,
    rejects: Mapping[str, Sequence[str]],
    *,
    is_torn: bool = False,
    split: str = "train",
) -> Receipt:
    return Receipt(
        unit="u",
        files=(),
        num_in=num_in,
        num_out=num_in - sum(map(len, rejects.values())),
        rejects=rejects,
        facts={"split": split, "is_torn": is_torn, "errors": {}},
    )


def test_every_reject_is_told_with_its_origin(tmp_path: Path) -> None:
    """The report has a line for each, the receipt the keys and a few messages."""
    tally = Tally()
    tally.keep("a", b"caption", b"picture")
    for key in "bcdef":
        tally.reject(key, NO_FILE, {"row": 3})
    tally.flag("a", Rejection(reason="member_unsafe:dropped", message="a pickle"), {"tar": "x"})
    outcome = tally.outcome(UNIT, files=tally.write_report(UNIT, tmp_path))
    assert outcome.files == ["rejects/train-00000.jsonl"]
    assert (outcome.num_in, outcome.num_out) == (6, 1)
    assert outcome.rejects == {"file_missing": list("bcdef")}
    assert outcome.flagged == {"member_unsafe:dropped": ["a"]}
    assert outcome.facts["errors"]["file_missing"] == [f"{key}: no file" for key in "bcd"]
    lines = [json.loads(line) for line in (tmp_path / outcome.files[0]).read_text().splitlines()]
    assert lines[0] == {
        "key": "b", "reason": "file_missing", "message": "no file", "source": {"row": 3},
    }  # fmt: skip
    assert len(lines) == 6
    assert read_report(tmp_path / outcome.files[0])["f"] == NO_FILE


def test_a_unit_without_rejects_has_no_report(tmp_path: Path) -> None:
    """Nothing to tell, no file."""
    tally = Tally()
    tally.keep("a", b"caption", b"picture")
    assert tally.write_report(UNIT, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_digests_tell_captions_from_pictures() -> None:
    """A changed caption changes the digest of captions alone; keys and order change both."""

    def digests(*samples: tuple[str, bytes, bytes]) -> dict[str, str]:
        shard = ShardDigests()
        for sample in samples:
            shard.add(*sample)
        return shard.facts()

    one, two = ("a", b"caption", b"picture"), ("b", b"c", b"p")
    before = digests(one, two)
    assert digests(one, two) == before
    caption = digests(("a", b"other", b"picture"), two)
    assert caption["captions"] != before["captions"]
    assert caption["pictures"] == before["pictures"]
    picture = digests(("a", b"caption", b"other"), two)
    assert picture["captions"] == before["captions"]
    assert picture["pictures"] != before["pictures"]
    for other in (digests(two, one), digests(("x", *one[1:]), two), digests(one)):
        assert other["captions"] != before["captions"]
        assert other["pictures"] != before["pictures"]


def test_the_budget_is_over_all_units_and_the_report_says_what_to_do() -> None:
    """Rejects are summed, reasons ordered by frequency, keys and remedies named."""
    receipts = [
        receipt(10, {"image_bomb": ["a"]}),
        receipt(10, {"http_404": ["b", "c", "d", "e"]}),
    ]
    check_budget(iter(receipts), 0.25)
    with pytest.raises(StageFailed) as failure:
        check_budget(iter(receipts), 0.2)
    report = str(failure.value)
    assert "5 of 20 rows were rejected (25.0%), data.max_rejects_fraction allows 20.0%" in report
    assert report.index("http_404: 4 (b, c, d, ...)") < report.index("image_bomb: 1 (a)")
    for remedy in ("rejects/*.jsonl", "ediffi cache retry ingest", "data.max_rejects_fraction"):
        assert remedy in report


def test_a_torn_tar_weighs_like_a_sound_one() -> None:
    """What nobody can count is charged at the average of sound tars, at least one sample each."""
    sound = [receipt(100, {}) for _ in range(9)]
    empty = receipt(1, {"shard_empty": ["x.tar"]}, is_torn=True)
    check_budget(iter([*sound, empty]), 0.1)
    with pytest.raises(StageFailed, match=r"100 of 1000 rows were rejected \(10\.0%\)") as failure:
        check_budget(iter([*sound, empty]), 0.09)
    assert "torn tars: 1, with about 99 samples beyond reach" in str(failure.value)
    half = receipt(60, {"shard_truncated": ["y"]}, is_torn=True)
    check_budget(iter([*sound, half]), 0.041)
    with pytest.raises(StageFailed, match="41 of 1000"):
        check_budget(iter([*sound, half]), 0.04)
    # Larger than the average: what was found in it counts, nothing is added.
    check_budget(iter([*sound, receipt(200, {"shard_damaged": ["z"]}, is_torn=True)]), 0.001)


def test_a_stage_without_training_samples_fails() -> None:
    """Whatever the budget allows, there must be something to train on."""
    receipts = [receipt(1, {}, split="held_out"), receipt(1, {"image_bomb": ["a"]})]
    with pytest.raises(StageFailed, match="no training samples: 2 rows, 1 of them rejected"):
        check_budget(iter(receipts), 1.0)
    with pytest.raises(StageFailed, match="no training samples: 0 rows"):
        check_budget(iter([]), 1.0)
