"""Tests of pipelines.stages.ingest and its parts, the real img2dataset over a local web server."""

import hashlib
import io
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ediffi.shards import JoinedShards, ShardRef, ShardWriter, read_shard
from pipelines.errors import RetryableError, StageFailed, UserError
from pipelines.recipe import HeldOut, PictureFolder, ReadyShards, UrlList
from pipelines.stage import Outcome, Receipt, Unit, Workspace
from pipelines.stages.fetch import classify, local_path, resolve_address
from pipelines.stages.ingest import AdoptShards, IngestFolder, IngestUrls
from pipelines.stages.rejects import Rejection

NOBODY = HeldOut(fraction=0.0)


def picture(seed: int, size: tuple[int, int] = (24, 16), kind: str = "png") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=kind)
    return stream.getvalue()


def write_pictures(folder: Path, num: int) -> None:
    folder.mkdir(exist_ok=True)
    for index in range(num):
        (folder / f"{index}.png").write_bytes(picture(index))


def write_list(path: Path, rows: Mapping[str, Sequence[Any]]) -> Path:
    pq.write_table(pa.table(rows), path)
    return path


def run(stage: Any, unit: Unit, scratch: Path) -> Outcome:
    scratch.mkdir(parents=True)
    return stage.run(unit, Workspace(scratch=scratch, durable=scratch, inputs={}))


def receipt(outcome: Outcome) -> Receipt:
    counts = {name: getattr(outcome, name) for name in ("num_in", "num_out", "rejects", "facts")}
    return Receipt(unit="u", files=(), seconds=0.0, attempt=1, host="here", **counts)


def samples(scratch: Path, outcome: Outcome) -> dict[str, dict[str, bytes]]:
    return dict(read_shard(scratch / outcome.files[0]))


def folder_stage(tmp_path: Path, rows: Mapping[str, Sequence[Any]], **config: Any) -> IngestFolder:
    (tmp_path / "pictures").mkdir(exist_ok=True)
    defaults = {"held_out": NOBODY, "image_px": 8, "shard_images": 100}
    return IngestFolder(
        config=PictureFolder(
            source="folder",
            folder=tmp_path / "pictures",
            list=write_list(tmp_path / "list.parquet", rows),
            **{**defaults, **config},
        ),
        seed=0,
    )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Leave the test's output alone."""

    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as http:
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/"
        http.shutdown()


@pytest.fixture
def dead_address() -> Iterator[str]:
    """An address that refuses connections: the port is bound, but nobody listens."""
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unheard.getsockname()[1]}/x.png"


# -- addresses -------------------------------------------------------------------------------------


def test_every_row_is_written_or_rejected_for_one_reason(
    tmp_path: Path, server: str, dead_address: str
) -> None:
    """Good pictures are written in the order of the list, each bad row is named with its reason,
    and a second run gives the same bytes."""
    served = tmp_path / "served"
    for name, data in {
        "a.png": picture(1, (30, 20)),
        "b c.jpg": picture(2, kind="jpeg"),
        "cut.jpg": picture(3, (200, 200), "jpeg")[:2000],
        "noise.png": b"this is no picture",
    }.items():
        (served / name).write_bytes(data)
    rows = [  # key, address, caption, what becomes of it
        ("k0", "a.png", "a picture", "written"),
        ("k1", "b c.jpg", "zwei Bilder ✓", "written"),
        ("k2", "absent.png", "not there", "http_404"),
        ("k3", dead_address, "nobody answers", "dead_host"),
        ("k4", "noise.png", "noise", "image_undecodable"),
        ("k5", "cut.jpg", "cut", "image_truncated"),
        ("k6", "a.png", "  ", "caption_empty"),
        ("k7", "a.png", None, "caption_empty"),
        ("k8", "a.png", "nul \0 in it", "caption_invalid"),
        ("k0", "a.png", "again", "duplicate_key"),
        ("k9", "", "no address", "address_empty"),
        ("", "a.png", "no key", "key_invalid"),
        ("k.1", server + "a.png?x=1", "whole address", "written"),
    ]
    keys, addresses, captions, fates = zip(*rows)
    columns = {"url": addresses, "caption": captions, "id": keys, "score": [0.5] * len(rows)}
    stage = IngestUrls(
        config=UrlList(
            source="urls",
            list=write_list(tmp_path / "list.parquet", columns),
            address_prefix=server,
            key_column="id",
            held_out=NOBODY,
            image_px=8,
        ),
        seed=0,
    )
    (unit,) = stage.plan({})
    outcome = run(stage, unit, tmp_path / "first")

    expected: dict[str, list[str]] = {}
    for index, (key, fate) in enumerate(zip(keys, fates)):
        if fate != "written":
            expected.setdefault(fate, []).append(key or f"row {index}")
    assert outcome.rejects == expected
    assert (outcome.num_in, outcome.num_out) == (len(rows), 3)
    assert outcome.facts["num_samples"] == 3
    assert "404" in outcome.facts["errors"]["http_404"][0]

    written = samples(tmp_path / "first", outcome)
    assert list(written) == ["k0", "k1", "k%2E1"]
    assert written["k1"]["txt"].decode() == "zwei Bilder ✓"
    assert Image.open(io.BytesIO(written["k0"]["png"])).size == (8, 8)
    assert json.loads(written["k0"]["json"]) == {
        "caption": "a picture",
        "url": "a.png",
        "width": 30,
        "height": 20,
        "id": "k0",
        "score": 0.5,
    }

    again = run(stage, unit, tmp_path / "second")
    first, second = (
        (tmp_path / name / "train-00000.tar").read_bytes() for name in ("first", "second")
    )
    assert again == outcome
    assert first == second


def test_an_outage_is_not_blamed_on_the_list(tmp_path: Path, dead_address: str) -> None:
    """A unit that reaches nothing at all is to be tried again, not recorded as rejects."""
    rows = {"url": [dead_address] * 10, "caption": ["c"] * 10}
    stage = IngestUrls(
        config=UrlList(
            source="urls",
            list=write_list(tmp_path / "list.parquet", rows),
            held_out=NOBODY,
            image_px=8,
        ),
        seed=0,
    )
    with pytest.raises(RetryableError, match=r"none of 10 addresses .*refused"):
        run(stage, stage.plan({})[0], tmp_path / "scratch")


def test_a_failing_downloader_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When img2dataset's process ends badly, the error has its exit code and last words."""
    (tmp_path / "0.png").write_bytes(picture(0))
    stage = IngestUrls(
        config=UrlList(
            source="urls",
            list=write_list(tmp_path / "list.parquet", {"url": ["0.png"], "caption": ["c"]}),
            held_out=NOBODY,
            image_px=8,
        ),
        seed=0,
    )
    monkeypatch.setattr("pipelines.stages.fetch.os.getpid", lambda: 1)
    with pytest.raises(RetryableError, match=r"exit code 1; it said:\nparent process 1 is gone"):
        run(stage, stage.plan({})[0], tmp_path / "scratch")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("HTTP Error 503: Service Unavailable", "http_503"),
        ("<urlopen error timed out>", "timeout"),
        ("The read operation timed out", "timeout"),
        ("<urlopen error [Errno -2] Name or service not known>", "dead_host"),
        ("Use of image disallowed by X-Robots-Tag directive", "robots_disallowed"),
        ("Remote end closed connection without response", "download_failed"),
    ],
)
def test_download_errors_have_reasons(message: str, reason: str) -> None:
    """The words of a failed download become a countable reason, and are kept."""
    assert classify(message) == Rejection(reason=reason, message=message)


def test_addresses_are_resolved_and_quoted(tmp_path: Path) -> None:
    """An address with a scheme stays, one without goes behind the prefix or beside the list."""
    (tmp_path / "a b.png").touch()
    assert resolve_address("http://h/ä%20b?x=1", "http://p/", tmp_path) == "http://h/%C3%A4%20b?x=1"
    assert resolve_address("a b.png", "http://p/", tmp_path) == "http://p/a%20b.png"
    assert resolve_address("a b.png", "", tmp_path) == (tmp_path / "a b.png").resolve().as_uri()


# -- folders and lists -----------------------------------------------------------------------------


def test_paths_stay_inside_the_folder(tmp_path: Path) -> None:
    """Parent directories, absolute paths and links that lead out are refused, an inner link not."""
    folder = tmp_path / "pictures"
    write_pictures(folder, 1)
    (tmp_path / "secret.png").touch()
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "in.png").symlink_to(folder / "0.png")
    for unsafe in ("../secret.png", str(tmp_path / "secret.png"), "out.png", "x/../0.png"):
        result = local_path(folder, unsafe)
        assert isinstance(result, Rejection), unsafe
        assert result.reason == "path_unsafe"
    assert local_path(folder, "in.png") == (folder / "0.png").resolve()


def test_folder_rows_are_written_or_rejected(tmp_path: Path) -> None:
    """A folder source counts unsafe and missing paths and writes the rest under row numbers."""
    write_pictures(tmp_path / "pictures", 3)
    stage = folder_stage(
        tmp_path,
        {"path": ["0.png", "../x.png", "no.png", "2.png"], "caption": ["a", "b", "c", "d"]},
    )
    outcome = run(stage, stage.plan({})[0], tmp_path / "scratch")
    assert outcome.rejects == {"file_missing": ["000000002"], "path_unsafe": ["000000001"]}
    assert list(samples(tmp_path / "scratch", outcome)) == ["000000000", "000000003"]


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
        for unit in stage.plan({})
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
        units = [unit for unit in source.units(300) if unit.arguments["split"] == "held_out"]
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
    first, second = stage.plan({})
    assert run(stage, first, tmp_path / "first").rejects == {}
    assert run(stage, second, tmp_path / "second").rejects == {"duplicate_key": ["7"]}


def test_csv_cells_are_the_text_that_stands_there(tmp_path: Path) -> None:
    """Leading zeros of keys, numeric captions and line breaks inside quotes survive a CSV."""
    write_pictures(tmp_path / "pictures", 2)
    stage = folder_stage(tmp_path, {"path": [""], "caption": [""]}, key_column="id")
    path = tmp_path / "list.csv"
    path.write_text('id,path,caption\n007,0.png,1\n008,1.png,"two\nlines"\n', encoding="utf-8-sig")
    config = stage.config.model_copy(update={"list": path})
    stage = IngestFolder(config=config, seed=0)
    outcome = run(stage, stage.plan({})[0], tmp_path / "scratch")
    captions = {
        key: members["txt"].decode()
        for key, members in samples(tmp_path / "scratch", outcome).items()
    }
    assert captions == {"007": "1", "008": "two\nlines"}


def test_a_unit_reads_only_its_row_groups(tmp_path: Path) -> None:
    """A slice across the row groups of a parquet file gives exactly its own rows."""
    stage = folder_stage(tmp_path, {"path": ["x"], "caption": ["c"]}, shard_images=5)
    table = pa.table({"path": ["x"] * 23, "caption": [str(index) for index in range(23)]})
    pq.write_table(table, stage.config.list, row_group_size=4)
    captions = [[row.caption for row in stage.source.rows(unit)] for unit in stage.plan({})]
    expected = [str(index) for index in range(23)]
    assert captions == [expected[start : start + 5] for start in range(0, 23, 5)]


def test_captions_that_are_not_text_are_invalid(tmp_path: Path) -> None:
    """Numbers, lists and bytes that are not UTF-8 in a caption column are rejected, not crashes."""
    for column in ([1], [["a", "list"]], [b"\xff\xfe"]):
        stage = folder_stage(tmp_path, {"path": ["0.png"], "caption": column})
        (row,) = stage.source.rows(stage.plan({})[0])
        assert row.rejection is not None
        assert row.rejection.reason == "caption_invalid"


def test_bad_lists_are_the_users_errors(tmp_path: Path) -> None:
    """An absent list is planned as absent and then named; so are absent columns and values."""
    rows = {"path": ["x"], "caption": ["c"]}
    with pytest.raises(UserError, match=r"caption_column: .*no column 'text'; it has: path, capt"):
        folder_stage(tmp_path, rows, caption_column="text").plan({})
    with pytest.raises(UserError, match=r"no row of .* has 'z' in column 'caption'"):
        folder_stage(tmp_path, rows, held_out=HeldOut(column="caption", value="z")).plan({})
    stage = folder_stage(tmp_path, rows)
    stage.config.list.write_bytes(b"PAR1 no parquet")
    with pytest.raises(UserError, match=r"data\.list: cannot read"):
        stage.plan({})
    stage.config.list.unlink()
    assert stage.identity()["list_sha256"] == "absent"
    with pytest.raises(UserError, match=f"data.list: no file at {stage.config.list}"):
        stage.plan({})


def test_identity_is_what_changes_bytes(tmp_path: Path) -> None:
    """Time limits, threads and the place of the server do not make old shards stale."""
    path = write_list(tmp_path / "list.parquet", {"url": ["x"], "caption": ["c"]})
    config = UrlList(source="urls", list=path, image_px=8)

    def identity(**changed: Any) -> Any:
        return IngestUrls(config=config.model_copy(update=changed), seed=0).identity()

    how = {"address_prefix": "http://h/", "timeout_s": 1, "threads": 1, "max_rejects_fraction": 1.0}
    assert identity(**how) == identity()
    assert identity()["list_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    for changed in ({"image_px": 9}, {"resize": "pad"}, {"shard_images": 2}, {"held_out": NOBODY}):
        assert identity(**changed) != identity()


# -- ready shards --------------------------------------------------------------------------------


def ready_stage(tmp_path: Path) -> AdoptShards:
    return AdoptShards(
        config=ReadyShards(
            source="shards",
            train=str(tmp_path / "train" / "*.tar"),
            held_out=str(tmp_path / "held_out" / "*.tar"),
            image_px=8,
        )
    )


def write_ready(path: Path, members: Mapping[str, Mapping[str, bytes]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with ShardWriter(path) as writer:
        for key, content in members.items():
            writer.write(key, content)


def test_sound_shards_stay_where_they_lie(tmp_path: Path) -> None:
    """Ready tars are adopted by absolute path and digest under unit names that differ by split."""
    sound = {"a": {"jpg": picture(0, kind="jpeg"), "txt": b"c"}}
    for split in ("train", "held_out"):
        write_ready(tmp_path / split / "00000.tar", sound)
    stage = ready_stage(tmp_path)
    train, held_out = stage.plan({})
    outcome = run(stage, train, tmp_path / "scratch")
    (file,) = outcome.adopted
    data = (tmp_path / "train" / "00000.tar").read_bytes()
    assert file.path == str(tmp_path / "train" / "00000.tar")
    assert (file.sha256, file.num_bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    assert outcome.facts["shard"] == "train-00000.tar"
    assert held_out.id == "held-out-00000"
    assert list((tmp_path / "scratch").iterdir()) == []


def test_unfit_ready_samples_are_left_out_of_a_copy(tmp_path: Path) -> None:
    """What training could not read is rejected by reason; the copy without it can be trained on."""
    image = picture(0)
    write_ready(
        tmp_path / "train" / "x.tar",
        {
            "a": {"png": image, "txt": b"caption"},
            "b": {"txt": b"no image"},
            "c": {"png": image},
            "d": {"png": image[:100], "txt": b"cut"},
            "e": {"png": image, "json": json.dumps({"caption": "in json"}).encode()},
            "f": {"png": image, "txt": b"\xff"},
        },
    )
    write_ready(tmp_path / "held_out" / "x.tar", {"a": {"png": image, "txt": b"caption"}})
    stage = ready_stage(tmp_path)
    outcome = run(stage, stage.plan({})[0], tmp_path / "scratch")
    assert outcome.rejects == {
        "caption_invalid": ["f"],
        "caption_missing": ["c"],
        "image_missing": ["b"],
        "image_truncated": ["d"],
    }
    shard = ShardRef(
        name="x",
        image_path=tmp_path / "scratch" / outcome.files[0],
        embedding_paths={},
        num_samples=outcome.facts["num_samples"],
    )
    joined = JoinedShards([shard], image_px=8)
    assert [joined[index].caption for index in range(len(joined))] == ["caption", "in json"]


def test_torn_or_absent_ready_shards_are_the_users_errors(tmp_path: Path) -> None:
    """A cut tar is named with its field, and a pattern without a match is not an empty split."""
    stage = ready_stage(tmp_path)
    with pytest.raises(UserError, match=r"data\.train: no \.tar file matches"):
        stage.plan({})
    path = tmp_path / "train" / "x.tar"
    write_ready(path, {"a": {"png": picture(0), "txt": b"c"}})
    write_ready(tmp_path / "held_out" / "x.tar", {"a": {"png": picture(0), "txt": b"c"}})
    unit = stage.plan({})[0]
    path.write_bytes(path.read_bytes()[:512])
    with pytest.raises(UserError, match=r"data\.train: .*x\.tar"):
        run(stage, unit, tmp_path / "scratch")


# -- the whole stage -------------------------------------------------------------------------------


def test_too_many_rejects_fail_the_stage_with_a_report(tmp_path: Path) -> None:
    """The budget is over all units; the report counts reasons, names keys and says what to do."""
    write_pictures(tmp_path / "pictures", 6)
    names = ["0.png", "1.png", "2.png", "3.png", "no.png", "../5.png"]
    stage = folder_stage(
        tmp_path,
        {"path": names, "caption": ["c"] * 6},
        shard_images=3,
        max_rejects_fraction=0.25,
    )
    receipts = [receipt(run(stage, unit, tmp_path / unit.id)) for unit in stage.plan({})]
    with pytest.raises(StageFailed) as failure:
        stage.check(receipts)
    report = str(failure.value)
    assert "2 of 6 rows were rejected (33.3%), data.max_rejects_fraction allows 25.0%" in report
    assert "file_missing: 1 (000000004); 000000004: no file at" in report
    assert "path_unsafe: 1 (000000005)" in report
    assert "mend the list, or raise data.max_rejects_fraction" in report

    config = stage.config.model_copy(update={"max_rejects_fraction": 0.34})
    IngestFolder(config=config, seed=0).check(receipts)


def test_a_stage_without_training_samples_fails(tmp_path: Path) -> None:
    """Whatever the budget allows, there must be something to train on."""
    write_pictures(tmp_path / "pictures", 1)
    rows = {"path": ["0.png", "no.png"], "caption": ["c", "c"], "part": ["h", "t"]}
    held_out = HeldOut(column="part", value="h")
    stage = folder_stage(tmp_path, rows, held_out=held_out, max_rejects_fraction=1.0)
    receipts = [receipt(run(stage, unit, tmp_path / unit.id)) for unit in stage.plan({})]
    with pytest.raises(StageFailed, match="no training samples: 2 rows, 1 of them rejected"):
        stage.check(receipts)


def test_planning_imports_nothing_heavy() -> None:
    """Importing the stage brings in none of the libraries that only its units need."""
    heavy = ("torch", "pandas", "pyarrow", "img2dataset", "PIL", "webdataset")
    program = (
        "import sys, pipelines.stage, pipelines.errors, importlib.util as u; "
        # the package's __init__ names every stage; this one is loaded by its own path
        "sys.modules['pipelines.stages'] = m = type(sys)('pipelines.stages'); "
        "m.__path__ = list(u.find_spec('pipelines').submodule_search_locations)[:1]; "
        "m.__path__ = [m.__path__[0] + '/stages']; "
        "import pipelines.stages.ingest; "
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
