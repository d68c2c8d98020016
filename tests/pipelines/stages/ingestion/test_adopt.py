"""Tests of adopting and its parts: tars from strangers, sound, torn and hostile."""

import hashlib
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ediffi.shards import read_shard
from pipelines.errors import StageFailed, UserError
from pipelines.recipe import ReadyShards
from pipelines.stage import Outcome, Receipt, Unit
from pipelines.stages.ingestion.adopt import AdoptShards
from pipelines.stages.ingestion.duplicate_keys import KEYS_FOLDER
from pipelines.store.location import location
from tests.pipelines.stages.ingest_inputs import (
    picture,
    plan,
    receipt,
    run,
    samples,
    tar_of,
    write_tar,
)

IMAGE = picture(0)
GOOD = {"png": IMAGE, "txt": b"caption"}


def stage_over(folder: Path, **config: Any) -> AdoptShards:
    return AdoptShards(
        config=ReadyShards(source="shards", train=str(folder / "*.tar"), image_px=8, **config)
    )


def adopt(path: Path, scratch: Path, **config: Any) -> Outcome:
    """Run the one unit over one tar."""
    stage = stage_over(path.parent, **config)
    (unit,) = plan(stage)
    return run(stage, unit, scratch)


def raw_tar(path: Path, members: Mapping[str, bytes | tarfile.TarInfo]) -> Path:
    """Write a tar of any members, whatever their names or kinds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, member in members.items():
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(member)
                tar.addfile(info, io.BytesIO(member))
    return path


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def report(scratch: Path) -> list[Any]:
    path = scratch / "rejects" / "train-00000.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- sound tars ------------------------------------------------------------------------------------


def test_sound_shards_stay_where_they_lie(tmp_path: Path) -> None:
    """Ready tars are adopted by absolute path and digest under unit names that differ by split;
    beside the receipt go an index, the keys' hashes and digests of captions and pictures."""
    for split in ("train", "held_out"):
        write_tar(tmp_path / split / "00000.tar", {"a": GOOD, "b": GOOD})
    stage = stage_over(tmp_path / "train", held_out=str(tmp_path / "held_out" / "*.tar"))
    train, held_out = plan(stage)
    outcome = run(stage, train, tmp_path / "scratch")
    (file,) = outcome.adopted
    data = (tmp_path / "train" / "00000.tar").read_bytes()
    assert file.path == str(tmp_path / "train" / "00000.tar")
    assert (file.sha256, file.num_bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    assert outcome.facts["shard"] == "train-00000.tar"
    assert set(outcome.facts["digests"]) == {"captions", "pictures"}
    assert not outcome.facts["is_torn"]
    assert held_out.id == "held-out-00000"
    assert outcome.files == ("train-00000.index.json", f"{KEYS_FOLDER}/train-00000.u64")
    assert all((tmp_path / "scratch" / name).is_file() for name in outcome.files)
    assert (tmp_path / "scratch" / outcome.files[1]).stat().st_size == 2 * 8


def test_nothing_needs_to_be_held_out(tmp_path: Path) -> None:
    """Without a pattern for held-out tars there are no such units."""
    write_tar(tmp_path / "x.tar", {"a": GOOD})
    assert [unit.id for unit in plan(stage_over(tmp_path))] == ["train-00000"]


def test_unfit_ready_samples_are_left_out_of_a_copy(tmp_path: Path) -> None:
    """What training could not read is rejected by reason; the copy without it can be read."""
    path = write_tar(
        tmp_path / "x.tar",
        {
            "a": GOOD,
            "b": {"txt": b"no image"},
            "c": {"png": IMAGE},
            "d": {"jpg": picture(1, (60, 60), "jpeg")[:600], "txt": b"cut"},
            "e": {"png": IMAGE, "json": json.dumps({"caption": "in json"}).encode()},
            "f": {"png": IMAGE, "txt": b"\xff"},
            "g": {"png": IMAGE, "txt": b"nul \0"},
            "h": {"png": IMAGE, "txt": b"x" * 1_000_000},
            "i": {"png": IMAGE, "txt": b" "},
            "j": {"png": IMAGE, "json": b"[" * 100_000},
            "k": {"png": IMAGE, "json": b"{}"},
            "l": {"png": b"no picture", "txt": b"c"},
            "m": {"png": picture(0, (100, 100)), "txt": b"too many pixels"},
            "n": {"png": IMAGE + b"x" * 70_000, "txt": b"too many bytes"},
            "__o": GOOD,
            "p": {"png": IMAGE, "txt": "é".encode() * 41},
        },
    )
    limits = {"max_pixels": 5000, "max_picture_mib": 0.06, "max_caption_characters": 40}
    outcome = adopt(path, tmp_path / "scratch", **limits)
    assert outcome.rejects == {
        "caption_empty": ["i"],
        "caption_invalid": ["f", "g", "j"],
        "caption_missing": ["c", "k"],
        "caption_too_long": ["h", "p"],
        "image_bomb": ["m"],
        "image_missing": ["b"],
        "image_too_large": ["n"],
        "image_truncated": ["d"],
        "image_undecodable": ["l"],
        "key_invalid": ["__o"],
    }
    assert (outcome.num_in, outcome.num_out) == (16, 2)
    kept = samples(tmp_path / "scratch", outcome)
    assert {key: members["txt"] for key, members in kept.items()} == {
        "a": b"caption",
        "e": b"in json",
    }
    lines = {line["key"]: line for line in report(tmp_path / "scratch")}
    assert (
        lines["h"]["message"] == "1000000 bytes, data.max_caption_characters allows 40 characters"
    )
    assert lines["d"]["source"] == {"tar": str(path), "member": "d"}
    assert lines.keys() == {*"bcdfghijklmnp", "__o"}


def test_captions_may_be_as_long_as_in_characters(tmp_path: Path) -> None:
    """The limit counts characters, not bytes."""
    path = write_tar(tmp_path / "x.tar", {"a": {"png": IMAGE, "txt": "é".encode() * 40}})
    assert adopt(path, tmp_path / "scratch", max_caption_characters=40).num_out == 1


# -- torn tars -------------------------------------------------------------------------------------


def three(path: Path) -> tuple[Path, bytes]:
    """A tar of three samples, two members each; and its bytes."""
    write_tar(path, {key: {"png": IMAGE, "txt": b"caption"} for key in "abc"})
    return path, path.read_bytes()


@pytest.mark.parametrize(
    ("cut", "reason", "kept"),
    [
        ("member boundary", "shard_truncated", ["a"]),
        ("sample boundary", "shard_truncated", ["a", "b"]),
        ("inside a member", "shard_truncated", ["a"]),
        ("inside a header", "shard_truncated", ["a"]),
        ("empty", "shard_empty", []),
        ("header damaged", "shard_damaged", ["a", "c"]),
        ("garbage", "shard_damaged", []),
    ],
)
def test_torn_tars_are_named_and_whole_samples_salvaged(
    tmp_path: Path, cut: str, reason: str, kept: list[str]
) -> None:
    """Wherever a tar is cut or damaged, it is counted, what is whole goes on, the unit succeeds."""
    path, data = three(tmp_path / "x.tar")
    with tarfile.open(path) as tar:
        starts = {member.name: member.offset for member in tar}
    header = starts["b.png"]
    damaged = data[:header] + bytes(100 * [255]) + data[header + 100 :]
    path.write_bytes(
        {
            "member boundary": data[: starts["b.txt"]],
            "sample boundary": data[: starts["c.png"]],
            "inside a member": data[: header + 700],
            "inside a header": data[: header + 100],
            "empty": b"",
            "header damaged": damaged,
            "garbage": b"no tar at all " * 100,
        }[cut]
    )
    outcome = adopt(path, tmp_path / "scratch")
    assert reason in outcome.rejects
    assert outcome.facts["is_torn"]
    assert outcome.adopted == ()
    assert list(samples(tmp_path / "scratch", outcome)) == kept
    assert outcome.num_out == len(kept)
    assert outcome.num_in == outcome.num_out + sum(map(len, outcome.rejects.values()))
    assert all(line["source"]["tar"] == str(path) for line in report(tmp_path / "scratch"))
    assert adopt(path, tmp_path / "again") == outcome


def test_a_torn_tar_is_within_the_budget_or_fails_the_stage(tmp_path: Path) -> None:
    """One cut tar among ten is charged what it lost, and the stage's check decides."""
    for index in range(10):
        keys = [f"{index}-{sample}" for sample in range(10)]
        write_tar(tmp_path / f"{index}.tar", dict.fromkeys(keys, GOOD))
    torn = tmp_path / "3.tar"
    torn.write_bytes(b"")
    stage = stage_over(tmp_path, max_rejects_fraction=0.1)
    receipts = [receipt(unit, run(stage, unit, tmp_path / unit.id)) for unit in plan(stage)]
    stage.check(receipts)
    with pytest.raises(StageFailed, match=r"10 of 100 rows were rejected") as failure:
        stage_over(tmp_path, max_rejects_fraction=0.09).check(receipts)
    assert "shard_empty: 1 (3.tar)" in str(failure.value)


# -- hostile tars ----------------------------------------------------------------------------------


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def array(content: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, content, allow_pickle=True)
    return stream.getvalue()


def archive(**arrays: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, content in arrays.items():
            file.writestr(f"{name}.npy", content)
    return stream.getvalue()


def test_members_that_would_run_code_are_dropped_and_their_samples_kept(tmp_path: Path) -> None:
    """Pickles in any wrapping are named and left out; plain arrays stay; nothing is executed."""
    mark = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(str(mark)))
    objects = array(np.array([Bomb(str(mark))], dtype=object))
    numbers = array(np.arange(3))
    dangerous = {
        "pkl": bomb, "pickle": bomb, "pyd": bomb, "seg.pth": bomb, "npy": objects,
        "b.npz": archive(fine=numbers, evil=objects), "c.npy": b"\x93NUMPY\1\0", "d.npz": b"PK",
    }  # fmt: skip
    harmless = {"e.npy": numbers, "f.npz": archive(fine=numbers), "cls": b"3"}
    path = write_tar(tmp_path / "x.tar", {"a": {**GOOD, **dangerous, **harmless}, "b": GOOD})
    outcome = adopt(path, tmp_path / "scratch")
    kept = samples(tmp_path / "scratch", outcome)
    assert kept["a"] == {**GOOD, **harmless}
    assert kept["b"] == GOOD
    assert outcome.rejects == {}
    assert outcome.flagged == {"member_unsafe:dropped": ["a"]}
    told = {line["source"]["member"] for line in report(tmp_path / "scratch")}
    assert told == {f"a.{name}" for name in dangerous}
    assert not mark.exists()


def test_paths_that_lead_elsewhere_and_links_are_left_out(tmp_path: Path) -> None:
    """`..`, a leading slash, and links never reach a disk; samples without them are kept."""
    path = raw_tar(
        tmp_path / "x.tar",
        {
            "a.png": IMAGE, "a.txt": b"caption",
            "../evil.png": IMAGE, "../evil.txt": b"c",
            "/etc/passwd.png": IMAGE, "/etc/passwd.txt": b"c",
            "l.png": link("l.png", "/etc/passwd"), "l.txt": b"c",
            "README": link("README", "/etc/passwd"),
            "z.png": IMAGE, "z.txt": b"caption",
        },
    )  # fmt: skip
    outcome = adopt(path, tmp_path / "scratch")
    assert list(samples(tmp_path / "scratch", outcome)) == ["a", "z"]
    assert outcome.rejects == {"member_link": ["l"], "path_unsafe": ["../evil", "/etc/passwd"]}
    assert outcome.flagged == {"member_link:dropped": ["README"]}
    assert not outcome.facts["is_torn"]
    inside = {entry.name for entry in tmp_path.iterdir()}
    assert inside == {"x.tar", "scratch"}


def test_of_equal_keys_in_a_tar_the_first_stays(tmp_path: Path) -> None:
    """A key that comes again apart or side by side is a duplicate, and counted as a sample."""
    path = raw_tar(tmp_path / "x.tar", {"a.png": IMAGE, "a.txt": b"first"})
    with tarfile.open(path, "a", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in [
            ("b.png", IMAGE), ("b.txt", b"c"), ("a.png", IMAGE), ("a.txt", b"second"),
        ]:  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    outcome = adopt(path, tmp_path / "scratch")
    kept = samples(tmp_path / "scratch", outcome)
    assert {key: members["txt"] for key, members in kept.items()} == {"a": b"first", "b": b"c"}
    assert outcome.rejects == {"duplicate_key": ["a"]}
    assert (outcome.num_in, outcome.num_out) == (3, 2)


def test_members_that_our_tars_cannot_name_are_dropped_from_a_copy(tmp_path: Path) -> None:
    """A copy leaves out what could not be read back from it, and says so."""
    key = "k" * 75
    members = {f"{key}.png": IMAGE, f"{key}.txt": b"c", f"{key}.{'x' * 30}": b"", f"{key}._x": b""}
    path = raw_tar(tmp_path / "x.tar", {"b.txt": b"no image", **members})
    outcome = adopt(path, tmp_path / "scratch")
    assert set(samples(tmp_path / "scratch", outcome)[key]) == {"png", "txt"}
    assert outcome.flagged == {"member_unnamable:dropped": [key]}


# -- duplicates across tars ------------------------------------------------------------------------


def publish(stage: AdoptShards, unit: Unit, directory: Path) -> Receipt:
    """Run a unit and move its files to the stage's folder, as the runner does."""
    scratch = directory / f"scratch-{unit.id}-{len(unit.arguments['drop'])}"
    outcome = run(stage, unit, scratch)
    for name in outcome.files:
        (directory / name).parent.mkdir(exist_ok=True)
        (scratch / name).replace(directory / name)
    return receipt(unit, outcome)


def test_of_equal_keys_across_tars_the_earlier_stays(tmp_path: Path) -> None:
    """The later tar is done again without them, under another key, and then nothing is left."""
    write_tar(tmp_path / "tars" / "0.tar", {"a": GOOD, "b": GOOD})
    write_tar(tmp_path / "tars" / "1.tar", {"c": GOOD, "b": GOOD, "a": GOOD})
    write_tar(tmp_path / "tars" / "2.tar", {"d": GOOD})
    write_tar(tmp_path / "held" / "0.tar", {"d": GOOD, "e": GOOD})
    stage = stage_over(tmp_path / "tars", held_out=str(tmp_path / "held" / "*.tar"))
    units = {unit.id: unit for unit in plan(stage)}
    receipts = {unit.id: publish(stage, unit, tmp_path) for unit in units.values()}
    again = stage.amend(iter(receipts.values()), tmp_path)
    assert [(unit.id, unit.arguments["drop"]) for unit in again] == [
        ("train-00001", ["b", "a"]),
        ("held-out-00000", ["d"]),
    ]
    assert all(unit.key != units[unit.id].key for unit in again)
    receipts |= {unit.id: publish(stage, unit, tmp_path) for unit in again}
    assert receipts["train-00001"].rejects == {"duplicate_key": ["b", "a"]}
    assert list(dict(read_shard(tmp_path / "train-00001.tar"))) == ["c"]
    assert stage.amend(iter(receipts.values()), tmp_path) == []


# -- planning --------------------------------------------------------------------------------------


def test_a_tar_that_is_written_anew_is_another_unit(tmp_path: Path) -> None:
    """Time and size of a tar decide its unit's key and the stage's identity; limits decide all."""
    for name in "01":
        write_tar(tmp_path / f"{name}.tar", {name: GOOD})
    stage = stage_over(tmp_path)
    before, identity = {unit.id: unit.key for unit in plan(stage)}, stage.identity()
    os.utime(tmp_path / "1.tar", ns=(1, 1))
    after = {unit.id: unit.key for unit in plan(stage)}
    assert {unit for unit in before if before[unit] != after[unit]} == {"train-00001"}
    assert stage.identity() != identity
    limited = {unit.id: unit.key for unit in plan(stage_over(tmp_path, max_pixels=7))}
    assert not set(limited.values()) & set(after.values())
    loose = {unit.id: unit.key for unit in plan(stage_over(tmp_path, max_rejects_fraction=1.0))}
    assert loose == after


def test_absent_or_changed_tars_are_the_users_errors(tmp_path: Path) -> None:
    """A pattern without a match, a tar that is gone or another one by now: named with the field."""
    stage = stage_over(tmp_path)
    with pytest.raises(UserError, match=r"data\.train: no \.tar file matches"):
        stage.plan({})
    path = write_tar(tmp_path / "x.tar", {"a": GOOD})
    (unit,) = plan(stage)
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=r"data\.train: .*x\.tar has changed since this run began"):
        run(stage, unit, tmp_path / "scratch")
    path.unlink()
    with pytest.raises(UserError, match=r"data\.train: cannot read .*x\.tar"):
        run(stage, unit, tmp_path / "again")


def test_tars_in_an_object_store_keep_their_address(tmp_path: Path, s3_store: str) -> None:
    """Remote tars are read through a copy and adopted by URL; a mended one becomes our own."""
    folder = location(s3_store)
    for name, members in {"0": GOOD, "1": {"png": IMAGE}}.items():
        local = write_tar(tmp_path / f"{name}.tar", {f"s{name}": members, f"t{name}": GOOD})
        (folder / f"{name}.tar").write_bytes(local.read_bytes())
    stage = AdoptShards(config=ReadyShards(source="shards", train=f"{s3_store}/*.tar", image_px=8))
    sound, mended = plan(stage)
    outcome = run(stage, sound, tmp_path / "sound")
    (file,) = outcome.adopted
    data = (tmp_path / "0.tar").read_bytes()
    assert file.path == f"{s3_store}/0.tar"
    assert (file.sha256, file.num_bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    outcome = run(stage, mended, tmp_path / "mended")
    assert outcome.rejects == {"caption_missing": ["s1"]}
    assert list(dict(read_shard(tar_of(outcome, tmp_path / "mended")))) == ["t1"]
    identity = stage.identity()
    (folder / "0.tar").write_bytes((tmp_path / "1.tar").read_bytes())
    assert stage.identity() != identity
    with pytest.raises(UserError, match="has changed since this run began"):
        run(stage, sound, tmp_path / "changed")
