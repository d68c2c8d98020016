"""Tests of source_list, list_file and row_shards: rows, splits, units and keys."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import UserError
from pipelines.recipe import HeldOut
from pipelines.stages.ingest import IngestFolder
from pipelines.stages.ingestion import list_file
from pipelines.stages.ingestion.source_list import Row
from pipelines.store.fingerprint import changed_parts
from tests.pipelines.stages.ingest_inputs import (
    NOBODY,
    folder_stage,
    plan,
    run,
    samples,
    write_list,
    write_pictures,
)


def table(num: int, **columns: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """`num` rows of paths, captions and keys, some columns replaced."""
    rows = {
        "path": [f"{index}.png" for index in range(num)],
        "caption": [f"caption {index}" for index in range(num)],
        "id": [f"k{index}" for index in range(num)],
        "score": [index / 7 if index % 3 else None for index in range(num)],
    }
    return {**rows, **columns}


def keys_of(stage: IngestFolder) -> dict[str, str]:
    return {unit.id: unit.key for unit in plan(stage)}


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    return {unit for unit in after if before.get(unit) != after[unit]}


# -- units -----------------------------------------------------------------------------------------


def test_units_are_consecutive_rows_of_one_split(tmp_path: Path) -> None:
    """Holding out by column keeps the order of the list and cuts each split into full shards."""
    write_pictures(tmp_path / "pictures", 7)
    stage = folder_stage(
        tmp_path,
        {
            "path": [f"{index}.png" for index in range(7)],
            "caption": ["c"] * 7,
            "part": ["a", "b", "a", "a", "b", "a", "a"],
        },
        held_out=HeldOut(column="part", value="b"),
        shard_images=2,
    )
    keys = {
        unit.id: list(samples(tmp_path / unit.id, run(stage, unit, tmp_path / unit.id)))
        for unit in plan(stage)
    }
    assert keys == {
        "train-00000": ["000000000", "000000002"],
        "train-00001": ["000000003", "000000005"],
        "train-00002": ["000000006"],
        "held-out-00000": ["000000001", "000000004"],
    }


def test_held_out_fraction_belongs_to_the_key(tmp_path: Path) -> None:
    """The held-out set is about the fraction, differs by seed, and ignores the list's order."""
    keys = [f"k{index}" for index in range(1000)]

    def held_out(order: Sequence[str], seed: int) -> set[str]:
        rows = {"path": ["x"] * len(order), "caption": ["c"] * len(order), "id": list(order)}
        config = folder_stage(tmp_path, rows, key_column="id", held_out=HeldOut(fraction=0.2))
        source = IngestFolder(config=config.config, seed=seed).source
        units = [unit for unit in source.units(300, {}) if unit.arguments["split"] == "held_out"]
        return {row.key for unit in units for row in source.rows(unit)}

    chosen = held_out(keys, seed=0)
    assert 150 < len(chosen) < 250
    assert held_out(keys[::-1], seed=0) == chosen
    assert held_out(keys, seed=1) != chosen


def test_first_of_equal_keys_wins_across_shards(tmp_path: Path) -> None:
    """A later row with a key of an earlier shard is rejected where it stands."""
    write_pictures(tmp_path / "pictures", 3)
    stage = folder_stage(
        tmp_path,
        {"path": ["0.png", "1.png", "2.png"], "caption": ["a", "b", "c"], "id": [7, 8, 7]},
        key_column="id",
        shard_images=2,
    )
    first, second = plan(stage)
    assert run(stage, first, tmp_path / "first").rejects == {}
    assert run(stage, second, tmp_path / "second").rejects == {"duplicate_key": ["7"]}


def test_equal_hashes_of_different_keys_are_no_duplicates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row counts as duplicate by its key, whatever hash it shares with others."""
    import numpy as np

    rows = table(9, id=["a", "b", "c", "d", "a", "e", "f", "b", "a"])
    source = folder_stage(tmp_path, rows, key_column="id").source
    monkeypatch.setattr(list_file, "_PIECE_ROWS", 2)
    assert source._duplicates(np.array([1, 1, 1, 2, 1, 2, 3, 1, 1])) == {4, 7, 8}


def test_planning_a_long_list_is_lazy_and_cheap(tmp_path: Path) -> None:
    """Units come one by one, and the key of each stands for its rows however the file is cut."""
    rows = table(1000)
    stage = folder_stage(tmp_path, rows, shard_images=7, held_out=HeldOut(fraction=0.3))
    assert not isinstance(stage.plan({}), list)
    whole = plan(stage)
    pq.write_table(pa.table(rows), stage.config.list, row_group_size=13)
    assert plan(stage) == whole
    planned = [row.index for unit in whole for row in stage.source.rows(unit)]
    assert sorted(planned) == list(range(1000))


# -- keys of units ---------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["caption", "path", "score"])
def test_one_changed_cell_changes_one_unit(tmp_path: Path, column: str) -> None:
    """Whichever column a cell is in, the shard of its row is another, and no other shard."""
    rows = table(10)
    before = keys_of(folder_stage(tmp_path, rows, shard_images=3))
    cells = list(rows[column])
    cells[4] = 9.5 if column == "score" else "other"
    after = keys_of(folder_stage(tmp_path, {**rows, column: cells}, shard_images=3))
    assert changed(before, after) == {"train-00001"}
    assert changed_parts(before["train-00001"], after["train-00001"]) == ["rows"]


def test_absent_and_empty_cells_differ(tmp_path: Path) -> None:
    """A null is another content than an empty text or a zero."""
    nulls = keys_of(folder_stage(tmp_path, table(2, caption=["a", None], score=[1.0, None])))
    empty_text = table(2, caption=["a", ""], score=[1.0, None])
    zero = table(2, caption=["a", None], score=[1.0, 0.0])
    assert nulls not in [keys_of(folder_stage(tmp_path, rows)) for rows in (empty_text, zero)]
    # Text that moves from one cell into the next.
    first = keys_of(folder_stage(tmp_path, table(2, caption=["ab", "c"])))
    assert keys_of(folder_stage(tmp_path, table(2, caption=["a", "bc"]))) != first


def test_appended_rows_leave_full_shards_and_inserted_ones_move_the_rest(tmp_path: Path) -> None:
    """Shards are cut by position: appending changes the last, inserting all that follow."""
    rows = table(10)
    before = keys_of(folder_stage(tmp_path, rows, shard_images=3, key_column="id"))
    longer = keys_of(folder_stage(tmp_path, table(12), shard_images=3, key_column="id"))
    assert changed(before, longer) == {"train-00003"}
    inserted = {name: [*cells[:4], cells[9], *cells[4:9]] for name, cells in rows.items()}
    moved = keys_of(folder_stage(tmp_path, inserted, shard_images=3, key_column="id"))
    assert changed(before, moved) == {"train-00001", "train-00002", "train-00003"}


def test_settings_of_a_sample_enter_its_units_and_others_do_not(tmp_path: Path) -> None:
    """Size and limits change every unit; what is only about the run changes none."""
    before = keys_of(folder_stage(tmp_path, table(6), shard_images=3))
    for setting in (
        {"image_px": 9}, {"resize": "pad"}, {"max_pixels": 5}, {"max_picture_mib": 1.0},
        {"max_caption_characters": 7}, {"key_column": "id"},
    ):  # fmt: skip
        after = keys_of(folder_stage(tmp_path, table(6), shard_images=3, **setting))
        assert changed(before, after) == set(after), setting
    same = folder_stage(tmp_path, table(6), shard_images=3, max_rejects_fraction=1.0)
    assert keys_of(same) == before


def test_a_key_that_becomes_a_duplicate_changes_its_unit(tmp_path: Path) -> None:
    """The later row's shard changes when an earlier row takes its key, though its rows do not."""
    before = keys_of(folder_stage(tmp_path, table(6), shard_images=3, key_column="id"))
    ids = ["k5", *(f"k{index}" for index in range(1, 6))]
    after = keys_of(folder_stage(tmp_path, table(6, id=ids), shard_images=3, key_column="id"))
    assert changed(before, after) == {"train-00000", "train-00001"}
    assert changed_parts(before["train-00001"], after["train-00001"]) == ["duplicates"]


# -- rows ------------------------------------------------------------------------------------------


def test_csv_cells_are_the_text_that_stands_there(tmp_path: Path) -> None:
    """Leading zeros of keys, numeric captions and line breaks inside quotes survive a CSV."""
    stage = folder_stage(tmp_path, {"path": [""], "caption": [""]}, key_column="id")
    path = tmp_path / "list.csv"
    path.write_text('id,path,caption\n007,0.png,1\n008,1.png,"two\nlines"\n', encoding="utf-8-sig")
    config = stage.config.model_copy(update={"list": str(path), "shard_images": 1})
    stage = IngestFolder(config=config, seed=0)
    rows = [row for unit in plan(stage) for row in stage.source.rows(unit)]
    assert [(row.key, row.caption) for row in rows] == [("007", "1"), ("008", "two\nlines")]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_unit_reads_only_its_rows(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slice across row groups or pieces of a file gives exactly its own rows."""
    monkeypatch.setattr(list_file, "_PIECE_ROWS", 3)
    stage = folder_stage(tmp_path, {"path": ["x"], "caption": ["c"]}, shard_images=5)
    path = tmp_path / f"list.{kind}"
    expected = [str(index) for index in range(23)]
    if kind == "parquet":
        rows = pa.table({"path": ["x"] * 23, "caption": expected})
        pq.write_table(rows, path, row_group_size=4)
    else:
        path.write_text("path,caption\n" + "".join(f"x,{text}\n" for text in expected))
    stage = IngestFolder(config=stage.config.model_copy(update={"list": str(path)}), seed=0)
    captions = [[row.caption for row in stage.source.rows(unit)] for unit in plan(stage)]
    assert captions == [expected[start : start + 5] for start in range(0, 23, 5)]


def test_captions_that_are_not_text_are_invalid(tmp_path: Path) -> None:
    """Numbers, lists and bytes that are not UTF-8 in a caption column are rejected, not crashes."""
    for column in ([1], [["a", "list"]], [b"\xff\xfe"]):
        stage = folder_stage(tmp_path, {"path": ["0.png"], "caption": column})
        (row,) = stage.source.rows(plan(stage)[0])
        rejection = row.rejection(100)
        assert rejection is not None
        assert rejection.reason == "caption_invalid"


def test_long_captions_are_rejected_by_length(tmp_path: Path) -> None:
    """A caption may have as many characters as the recipe says, and the message has its length."""

    def rejection(caption: str) -> Any:
        row = Row(index=0, key="k", address="x", caption=caption, columns={}, is_duplicate=False)
        return row.rejection(10)

    assert rejection("é" * 10) is None
    found = rejection("x" * 1_000_000)
    assert found.reason == "caption_too_long"
    assert found.message == "1000000 characters, data.max_caption_characters allows 10"


def test_bad_lists_are_the_users_errors(tmp_path: Path) -> None:
    """An absent list is planned as absent and then named; so are absent columns and values."""
    rows = {"path": ["x"], "caption": ["c"]}
    with pytest.raises(UserError, match=r"caption_column: .*no column 'text'; it has: path, capt"):
        folder_stage(tmp_path, rows, caption_column="text").plan({})
    with pytest.raises(UserError, match=r"no row of .* has 'z' in column 'caption'"):
        folder_stage(tmp_path, rows, held_out=HeldOut(column="caption", value="z")).plan({})
    stage = folder_stage(tmp_path, rows)
    Path(stage.config.list).write_bytes(b"PAR1 no parquet")
    with pytest.raises(UserError, match=r"data\.list: cannot read"):
        stage.plan({})
    Path(stage.config.list).unlink()
    assert stage.identity()["list_sha256"] == "absent"
    with pytest.raises(UserError, match=f"data.list: no file at {stage.config.list}"):
        stage.plan({})
    config = stage.config.model_copy(update={"list": write_list(tmp_path / "list.txt", rows)})
    with pytest.raises(UserError, match=r"must end in \.parquet or \.csv"):
        IngestFolder(config=config, seed=0).plan({})


def test_a_list_that_is_damaged_behind_its_header_is_named(tmp_path: Path) -> None:
    """Damage that shows only while rows are read is the user's error with the field too."""
    stage = folder_stage(tmp_path, {"path": ["x"], "caption": ["c"]}, held_out=NOBODY)
    path = tmp_path / "list.csv"
    path.write_text("path,caption\nx,c\nx\n")
    stage = IngestFolder(config=stage.config.model_copy(update={"list": str(path)}), seed=0)
    with pytest.raises(UserError, match=r"data\.list: cannot read .*list\.csv"):
        plan(stage)


def test_units_of_an_empty_list_are_none(tmp_path: Path) -> None:
    """A list without rows gives no units; the stage's check then finds nothing to train on."""
    nothing = pa.array([], "string")
    assert plan(folder_stage(tmp_path, {"path": nothing, "caption": nothing})) == []
