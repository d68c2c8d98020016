"""Tests of pipelines.stages.ingest, the real img2dataset over a local web server."""

import hashlib
import io
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ediffi.storage.tar_index import INDEX_SUFFIX, read_index
from pipelines.errors import RetryableError, StageFailed, UserError
from pipelines.recipe import PictureFolder, ReadyShards, Recipe, UrlList
from pipelines.stage import File, Outcome, Receipt, Unit, Workspace
from pipelines.stages.ingest import IngestFolder, IngestUrls, ingest_stage
from pipelines.stages.ingestion import fetch as fetching
from pipelines.stages.ingestion.adopt import AdoptShards
from pipelines.stages.ingestion.earlier_shard import EarlierShard
from pipelines.store.fingerprint import file_sha256
from pipelines.store.location import Location, location
from tests.pipelines.stages.ingest_inputs import (
    NOBODY,
    folder_stage,
    picture,
    plan,
    receipt,
    run,
    samples,
    write_list,
    write_pictures,
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


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "PAUSE_S", 0.01)


def url_stage(tmp_path: Path, rows: dict[str, Sequence[Any]], **config: Any) -> IngestUrls:
    defaults = {"held_out": NOBODY, "image_px": 8, "allow_addresses": ("127.0.0.1",)}
    place = write_list(tmp_path / "list.parquet", rows)
    settings = UrlList(source="urls", list=place, **{**defaults, **config})
    return IngestUrls(config=settings, seed=0)


def published(unit: Unit, outcome: Outcome, scratch: Path) -> Receipt:
    """The receipt of a unit whose scratch is the stage's folder, digests and all."""
    files = [
        File(path=name, sha256=file_sha256(scratch / name), num_bytes=0) for name in outcome.files
    ]
    return receipt(unit, outcome, files)


def contents(scratch: Path, outcome: Outcome) -> dict[str, bytes]:
    return {name: (scratch / name).read_bytes() for name in outcome.files}


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
        "bomb.png": picture(4, (300, 300)),
        "large.png": picture(5) + bytes(400 * 1024),
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
        ("m0", "bomb.png", "too many pixels", "image_bomb"),
        ("m1", "large.png", "too many bytes", "image_too_large"),
        ("m2", "a.png", "x" * 1_000_000, "caption_too_long"),
        ("m3", "http://169.254.169.254/latest", "metadata", "address_refused"),
        ("m4", "file:///etc/passwd", "a file", "address_refused"),
    ]
    keys, addresses, captions, fates = zip(*rows)
    columns = {"url": addresses, "caption": captions, "id": keys, "score": [0.5] * len(rows)}
    limits = {"max_pixels": 50_000, "max_picture_mib": 0.35}
    stage = url_stage(tmp_path, columns, address_prefix=server, key_column="id", **limits)
    (unit,) = plan(stage)
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
    assert again.facts == outcome.facts
    assert contents(tmp_path / "second", again) == contents(tmp_path / "first", outcome)


def test_files_of_a_unit(tmp_path: Path) -> None:
    """A unit leaves its tar, the tar's index, and a report if something was rejected."""
    write_pictures(tmp_path / "pictures", 1)
    stage = folder_stage(tmp_path, {"path": ["0.png", "no.png"], "caption": ["c", "c"]})
    outcome = run(stage, plan(stage)[0], tmp_path / "scratch")
    assert outcome.files == (
        "train-00000.tar",
        f"train-00000{INDEX_SUFFIX}",
        "rejects/train-00000.jsonl",
    )
    tar_path, index_path, report_path = (tmp_path / "scratch" / name for name in outcome.files)
    index = read_index(
        index_path.read_bytes(),
        "x",
        tar_bytes=tar_path.stat().st_size,
        sha256=file_sha256(tar_path),
    )
    assert index.keys == ["000000000"]
    line = json.loads(report_path.read_text())
    assert (line["key"], line["reason"]) == ("000000001", "file_missing")
    assert line["source"] == {"list": stage.config.list, "row": 1, "address": "no.png"}


def test_an_outage_is_not_blamed_on_the_list(tmp_path: Path, dead_address: str) -> None:
    """A unit that reaches nothing at all is to be tried again, not recorded as rejects."""
    stage = url_stage(tmp_path, {"url": [dead_address] * 10, "caption": ["c"] * 10})
    with pytest.raises(RetryableError, match=r"none of 10 addresses .*refused"):
        run(stage, plan(stage)[0], tmp_path / "scratch")


def test_bad_allowed_addresses_are_told_before_any_work(tmp_path: Path) -> None:
    """An entry that is no network and no host is the user's error, named with its field."""
    stage = url_stage(tmp_path, {"url": ["x"], "caption": ["c"]}, allow_addresses=("http://h",))
    with pytest.raises(UserError, match=r"data\.allow_addresses: .*'http://h'"):
        stage.plan({})


# -- a retry of what failed ------------------------------------------------------------------------


def retry_case(tmp_path: Path, server: str, dead_address: str) -> tuple[IngestUrls, Unit, Receipt]:
    """A unit with samples and every sort of reject, published in `tmp_path/before`."""
    write_pictures(tmp_path / "served", 2)
    rows = {
        "url": ["0.png", dead_address, "no.png", "1.png", "0.png", "1.png"],
        "caption": ["a", "b", "c", " ", "e", "f"],
        "id": ["k0", "k1", "k2", "k3", "k0", "k5"],
    }
    stage = url_stage(tmp_path, rows, address_prefix=server, key_column="id")
    (unit,) = plan(stage)
    outcome = run(stage, unit, tmp_path / "before")
    assert outcome.rejects == {
        "caption_empty": ["k3"],
        "dead_host": ["k1"],
        "duplicate_key": ["k0"],
        "http_404": ["k2"],
    }
    return stage, unit, published(unit, outcome, tmp_path / "before")


def test_a_retry_asks_only_for_what_may_have_passed(
    tmp_path: Path, server: str, dead_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples and final rejects are kept without a question; if the rest fails again, no byte is
    another."""
    stage, unit, before = retry_case(tmp_path, server, dead_address)
    asked: list[str] = []
    real = fetching._run_round
    monkeypatch.setattr(
        fetching, "_run_round", lambda urls, *rest: (asked.extend(urls.values()), real(urls, *rest))
    )
    place = {"previous": before, "directory": tmp_path / "before"}
    outcome = run(stage, unit, tmp_path / "after", **place)
    assert asked == [dead_address]
    assert outcome.rejects == before.rejects
    assert outcome.facts == before.facts
    assert contents(tmp_path / "after", outcome) == contents(tmp_path / "before", outcome)


def test_a_retry_gives_what_a_fresh_ingest_would(tmp_path: Path, server: str) -> None:
    """A picture that can be had by now is put in its place, byte for byte as if from scratch."""
    write_pictures(tmp_path / "served", 3)
    rows = {"url": ["0.png", "1.png", "no.png", "2.png"], "caption": list("abcd")}
    shut = url_stage(tmp_path, rows, address_prefix=server, allow_addresses=())
    stage = url_stage(tmp_path, rows, address_prefix=server)
    (unit,) = plan(stage)
    assert plan(shut) == [unit]  # which addresses are allowed is not part of the result
    before = run(shut, unit, tmp_path / "before")
    assert before.rejects == {"address_refused": [f"{index:09d}" for index in range(4)]}
    previous = published(unit, before, tmp_path / "before")
    place = {"previous": previous, "directory": tmp_path / "before"}
    after = run(stage, unit, tmp_path / "after", **place)
    fresh = run(stage, unit, tmp_path / "fresh")
    assert after.rejects == {"http_404": ["000000002"]}
    assert after.facts == fresh.facts
    assert contents(tmp_path / "after", after) == contents(tmp_path / "fresh", fresh)


def test_an_earlier_shard_that_does_not_fit_settles_nothing(
    tmp_path: Path, server: str, dead_address: str, s3_store: str
) -> None:
    """With other rows, a damaged tar or without its report, it is as if there were none."""
    _, unit, before = retry_case(tmp_path, server, dead_address)

    def settles(unit: Unit, directory: Location = tmp_path / "before") -> bool:
        place = {"previous": before, "directory": directory}
        workspace = Workspace(scratch=tmp_path, durable=tmp_path, inputs={}, **place)
        with EarlierShard.of(unit, workspace) as earlier:
            settled = [earlier.has_settled(key) for key in ("k0", "k2", "k5")]
            assert not earlier.has_settled("k1")
        assert len(set(settled)) == 1
        return settled[0]

    assert settles(unit)
    assert not settles(Unit(id=unit.id, arguments=unit.arguments, key="another"))
    for name in ("train-00000.tar", "rejects/train-00000.jsonl"):
        path = tmp_path / "before" / name
        data = path.read_bytes()
        path.write_bytes(data + b"x")
        assert not settles(unit)
        path.unlink()
        assert not settles(unit)
        path.write_bytes(data)
    assert settles(unit)

    remote = location(s3_store)
    assert not settles(unit, remote)
    for file in before.files:
        (remote / file.path).write_bytes((tmp_path / "before" / file.path).read_bytes())
    assert settles(unit, remote)


# -- folders ---------------------------------------------------------------------------------------


def test_folder_rows_are_written_or_rejected(tmp_path: Path) -> None:
    """A folder source counts unsafe and missing paths and writes the rest under row numbers."""
    write_pictures(tmp_path / "pictures", 3)
    stage = folder_stage(
        tmp_path,
        {"path": ["0.png", "../x.png", "no.png", "2.png"], "caption": ["a", "b", "c", "d"]},
    )
    outcome = run(stage, plan(stage)[0], tmp_path / "scratch")
    assert outcome.rejects == {"file_missing": ["000000002"], "path_unsafe": ["000000001"]}
    assert list(samples(tmp_path / "scratch", outcome)) == ["000000000", "000000003"]


def test_a_caption_changes_the_digest_of_captions_alone(tmp_path: Path) -> None:
    """Image encoders need not look at a shard again when a caption changes."""
    write_pictures(tmp_path / "pictures", 2)
    digests = []
    for name, caption in (("first", "b"), ("second", "other")):
        stage = folder_stage(tmp_path, {"path": ["0.png", "1.png"], "caption": ["a", caption]})
        digests.append(run(stage, plan(stage)[0], tmp_path / name).facts["digests"])
    first, second = digests
    assert first["captions"] != second["captions"]
    assert first["pictures"] == second["pictures"]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_list_and_folder_in_an_object_store(tmp_path: Path, s3_store: str, kind: str) -> None:
    """Both may be URLs: what they give is what the same files on a disk give."""
    write_pictures(tmp_path / "pictures", 3)
    place, here = location(s3_store), tmp_path / f"list.{kind}"
    for path in (tmp_path / "pictures").iterdir():
        (place / "pictures" / path.name).write_bytes(path.read_bytes())
    rows = {"path": ["0.png", "no.png", "2.png"], "caption": ["a", "b", "c"]}
    local = folder_stage(tmp_path, rows)
    if kind == "csv":
        here.write_text("path,caption\n0.png,a\nno.png,b\n2.png,c\n")
    (place / here.name).write_bytes(here.read_bytes())
    config = {"folder": f"{s3_store}/pictures", "list": f"{s3_store}/list.{kind}"}
    stage = IngestFolder(config=local.config.model_copy(update=config), seed=0)
    (unit,) = plan(stage)
    outcome = run(stage, unit, tmp_path / "remote")
    expected = run(local, plan(local)[0], tmp_path / "local")
    assert outcome.rejects == {"file_missing": ["000000001"]} == expected.rejects
    tar = "train-00000.tar"
    assert (tmp_path / "remote" / tar).read_bytes() == (tmp_path / "local" / tar).read_bytes()
    identity = stage.identity()
    (place / here.name).write_bytes(here.read_bytes() + b"\n")
    assert stage.identity() != identity

    absent = {"folder": f"{s3_store}/none", "list": f"{s3_store}/none.csv"}
    for field, message in (("folder", "no directory"), ("list", "no file")):
        changed = stage.config.model_copy(update={field: absent[field]})
        with pytest.raises(UserError, match=rf"data\.{field}: {message} at s3://"):
            IngestFolder(config=changed, seed=0).plan({})


def test_relative_addresses_beside_a_remote_list(tmp_path: Path, s3_store: str) -> None:
    """Addresses without a scheme are objects beside the list when that is one."""
    place = location(s3_store)
    (place / "0.png").write_bytes(picture(0))
    write_list(tmp_path / "list.parquet", {"url": ["0.png", "no.png"], "caption": ["a", "b"]})
    (place / "list.parquet").write_bytes((tmp_path / "list.parquet").read_bytes())
    config = UrlList(source="urls", list=f"{s3_store}/list.parquet", held_out=NOBODY, image_px=8)
    stage = IngestUrls(config=config, seed=0)
    outcome = run(stage, plan(stage)[0], tmp_path / "scratch")
    assert outcome.rejects == {"file_missing": ["000000001"]}
    assert outcome.num_out == 1


# -- the whole stage -------------------------------------------------------------------------------


def test_identity_is_what_changes_bytes(tmp_path: Path) -> None:
    """Time limits, retries, allowed addresses and the server's place leave old shards valid."""
    path = write_list(tmp_path / "list.parquet", {"url": ["x"], "caption": ["c"]})
    config = UrlList(source="urls", list=path, image_px=8)

    def identity(**changed: Any) -> Any:
        return IngestUrls(config=config.model_copy(update=changed), seed=0).identity()

    how = {
        "address_prefix": "http://h/", "timeout_s": 1, "threads": 1, "retries": 9,
        "max_rejects_fraction": 1.0, "allow_addresses": ("10.0.0.0/8",),
    }  # fmt: skip
    assert identity(**how) == identity()
    assert identity()["list_sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    for changed in (
        {"image_px": 9}, {"resize": "pad"}, {"shard_images": 2}, {"held_out": NOBODY},
        {"max_pixels": 9}, {"max_picture_mib": 9.0}, {"max_caption_characters": 9},
    ):  # fmt: skip
        assert identity(**changed) != identity(), changed


def test_places_no_longer_depend_on_the_working_directory(
    demo_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The stage that travels to workers has absolute paths; URLs and absent patterns stay."""
    monkeypatch.chdir(tmp_path)

    def stage(data: Any) -> Any:
        return ingest_stage(demo_recipe.model_copy(update={"data": data}))

    urls = stage(UrlList(source="urls", list="a/list.csv", image_px=8))
    assert urls.config.list == str(tmp_path / "a" / "list.csv")
    folder = stage(
        PictureFolder(source="folder", list="s3://b/l.csv", folder="pictures", image_px=8)
    )
    assert folder.config.list == "s3://b/l.csv"
    assert folder.config.folder == str(tmp_path / "pictures")
    shards = stage(ReadyShards(source="shards", train="x/*.tar", image_px=8))
    assert isinstance(shards, AdoptShards)
    assert (shards.config.train, shards.config.held_out) == (str(tmp_path / "x" / "*.tar"), "")


def test_too_many_rejects_fail_the_stage_with_a_report(tmp_path: Path) -> None:
    """The budget is over all units; the report counts reasons, names keys and says what to do."""
    write_pictures(tmp_path / "pictures", 6)
    names = ["0.png", "1.png", "2.png", "3.png", "no.png", "../5.png"]
    rows = {"path": names, "caption": ["c"] * 6}
    stage = folder_stage(tmp_path, rows, shard_images=3, max_rejects_fraction=0.25)
    receipts = [receipt(unit, run(stage, unit, tmp_path / unit.id)) for unit in plan(stage)]
    with pytest.raises(StageFailed) as failure:
        stage.check(receipts)
    report = str(failure.value)
    assert "2 of 6 rows were rejected (33.3%), data.max_rejects_fraction allows 25.0%" in report
    assert "file_missing: 1 (000000004); 000000004: no file at" in report
    assert "path_unsafe: 1 (000000005)" in report

    config = stage.config.model_copy(update={"max_rejects_fraction": 0.34})
    IngestFolder(config=config, seed=0).check(receipts)


def test_planning_imports_nothing_heavy() -> None:
    """Importing the stage brings in none of the libraries that only its units need."""
    heavy = ("torch", "numpy", "pandas", "pyarrow", "img2dataset", "PIL", "webdataset", "fsspec")
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
