"""The truth table of stale caches: every edit can be made on every side, and is judged rightly."""

from pathlib import Path

import pytest

from benchmarks.peers.orchestrators import FILES
from benchmarks.stale_cache import TOYS, Toy, markdown, rows
from benchmarks.stale_edits import EDITS, STEPS, Edit, judge, replace_once, write_shard


@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.label)
def test_every_edit_can_be_made(tmp_path: Path, toy: Toy) -> None:
    """Each finds what it changes exactly once; all but `nothing` change the folder."""
    for index, edit in enumerate(EDITS):
        folder = tmp_path / str(index)
        toy.prepare(folder)
        before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
        edit.make(folder, toy.wording)
        after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
        changed = [path for path in before if after[path] != before[path]]
        assert len(changed) == (edit.name != "nothing"), edit.name


def test_new_bytes_keep_size_and_time_where_they_should(tmp_path: Path) -> None:
    """The hardest edit changes nothing but the bytes."""
    (edit,) = [one for one in EDITS if "size and time" in one.name]
    path = tmp_path / "input.tar"
    write_shard(path, edit.caption.replace("disk", "ring"))
    before, status = path.read_bytes(), path.stat()
    edit.make(tmp_path, TOYS[0].wording)
    assert path.read_bytes() != before
    assert path.stat().st_size == status.st_size
    assert path.stat().st_mtime_ns == status.st_mtime_ns


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)
def test_the_right_number_is_what_the_steps_make(tmp_path: Path, edit: Edit) -> None:
    """The steps themselves, run without any cache on the edited files, agree with `Edit.right`."""
    toy, folder = TOYS[0], tmp_path / "toy"
    toy.prepare(folder)
    edit.make(folder, toy.wording)
    names: dict = {}
    for module in ("reading", "helping"):
        exec((folder / f"{module}.py").read_text(), names)
    scaled = (folder / "stage_scaled.py").read_text()
    factor = int(scaled.partition("scale = times(")[2].partition(")")[0])
    add = int((folder / "recipe.yaml").read_text().partition("add: ")[2].split()[0])
    number = names["helper"](names["number_of"](folder / "input.tar")) + add
    assert number * factor == edit.right
    assert edit.changes <= STEPS


def test_verdicts() -> None:
    """A wrong number is a wrong hit whatever was done; extra steps are a needless miss."""
    (edit,) = [one for one in EDITS if one.name == "what a closure has captured"]
    assert judge(edit, edit.right, ["scaled"]) == "right"
    assert judge(edit, edit.right, ["read", "scaled"]) == "needless miss"
    assert judge(edit, EDITS[0].right, []) == "wrong hit"
    assert judge(edit, EDITS[0].right, ["read", "helped", "scaled"]) == "wrong hit"


def test_an_edit_must_find_its_words_once(tmp_path: Path) -> None:
    """Neither absent nor ambiguous words are edited."""
    (tmp_path / "a.py").write_text("one two two")
    replace_once(tmp_path, "one", "three")
    for words in ("one", "two"):
        with pytest.raises(ValueError, match="must stand once"):
            replace_once(tmp_path, words, "")


def test_table_and_rows() -> None:
    """Verdicts by side, counted below; the rows compare right answers."""
    table = {
        "a": {"ediffi": "right", "x": "wrong hit"},
        "b": {"ediffi": "right", "x": "right"},
        "c": {"ediffi": "needless miss", "x": "wrong hit"},
    }
    assert markdown(table).splitlines() == [
        "| edited | ediffi | x |",
        "|---|---|---|",
        "| a | right | wrong hit |",
        "| b | right | right |",
        "| c | needless miss | wrong hit |",
        "| **wrong hits** | 0 | 2 |",
        "| **needless misses** | 1 | 0 |",
    ]
    (one,) = rows(table, {"python": "3"})
    assert (one.ours, one.other, one.ratio, one.wins) == (2, 1, 2.0, True)


def test_sides_share_what_they_compute() -> None:
    """Scripts of all sides stand in one folder and use the same reading and helping modules."""
    for toy in TOYS:
        text = "".join((FILES / name).read_text() for name in toy.files)
        assert "from helping import helper" in text
        assert "from reading import number_of" in text
