"""Tests of store.ledger: what is published is whole, also when the process dies midway."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import RetryableError, UserError
from pipelines.planning import plan
from pipelines.recipe import Recipe
from pipelines.stage import File, Manifest, Outcome, Receipt, Unit
from pipelines.store import lease
from pipelines.store.ledger import Ledger
from pipelines.store.location import Location, write_atomically
from pipelines.store.stage_record import StageRecord
from tests.pipelines.fake_stages import FakeStage, write_run

UNIT = Unit(id="train-00000")


class Killed(BaseException):
    """Stands for the end of the process: nothing in the code may catch it."""


def publish(ledger: Ledger, record: StageRecord, unit: Unit = UNIT) -> Receipt:
    """Publish two files of one unit."""
    scratch = ledger.new_scratch()
    (scratch / "deep").mkdir()
    (scratch / "a.txt").write_text("a")
    (scratch / "deep" / "b.txt").write_text("bb")
    outcome = Outcome(
        files=["a.txt", "deep/b.txt"],
        adopted=[File(path="/elsewhere/c.tar", sha256="00", num_bytes=3)],
        num_in=3,
        num_out=2,
        rejects={"image_missing": ("k",)},
        facts={"split": "train"},
    )
    return record.publish(unit, outcome, scratch, seconds=1.23456, attempt=2)


def published(record: StageRecord) -> set[str]:
    """Files under their final names."""
    return {
        str(path.relative_to(record.directory))
        for path in record.directory.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def test_a_receipt_says_what_was_published(ledger: Ledger) -> None:
    """Files move into the store and the receipt, read back, holds digests and counts."""
    record = ledger.stage("ingest", "f0")
    receipt = publish(ledger, record)
    assert record.receipt(UNIT.id) == receipt
    assert published(record) == {"a.txt", "deep/b.txt", "receipts/train-00000.json"}
    assert [(file.path, file.num_bytes) for file in receipt.files] == [
        ("a.txt", 1),
        ("deep/b.txt", 2),
        ("/elsewhere/c.tar", 3),
    ]
    assert receipt.files[0].sha256.startswith("ca978112ca1bbdca")  # sha256 of "a"
    assert (receipt.num_in, receipt.num_out, receipt.attempt) == (3, 2, 2)
    assert receipt.rejects == {"image_missing": ["k"]}


def test_a_manifest_says_what_a_stage_is(ledger: Ledger) -> None:
    """A finished stage, read back, is equal to what was written, receipts in the units' order."""
    record = ledger.stage("ingest", "f0")
    units = [Unit(id="b"), Unit(id="a")]
    for unit in units:
        publish(ledger, record, unit)
    ids = [unit.id for unit in units]
    manifest = record.complete("ingest", {"version": 1}, {"x": "f1"}, {"x": "c1"}, ids, "run-1")
    assert record.is_complete
    assert Manifest.load(record.directory) == record.manifest() == manifest
    assert [receipt.unit for receipt in manifest.receipts] == ["b", "a"]
    totals = manifest.totals
    assert (totals.num_units, totals.num_in, totals.num_out, totals.num_bytes) == (2, 6, 4, 12)
    assert totals.rejects == {"image_missing": 2}
    assert manifest.seconds == pytest.approx(2.47)
    assert manifest.receipt("b").attempt == 2
    files = manifest.receipt("b").files
    assert manifest.path(files[0]) == manifest.local_path(files[0]) == record.directory / "a.txt"
    assert manifest.path(files[2]) == Path("/elsewhere/c.tar")


def test_equal_work_gives_an_equal_manifest(tmp_path: Path) -> None:
    """Seconds, attempts, hosts, run ids and dates stay out of the manifest and its receipts."""
    texts = []
    for name, run_id in (("one", "run-1"), ("two", "run-2")):
        ledger = Ledger.open(tmp_path / name)
        record = ledger.stage("ingest", "f0")
        publish(ledger, record)
        record.complete("ingest", {}, {}, {}, [UNIT.id], run_id)
        names = ("manifest.json", "receipts.jsonl")
        texts.append([(record.directory / name).read_bytes() for name in names])
    assert texts[0] == texts[1]


def test_timings_are_summed_and_fractions_averaged(ledger: Ledger) -> None:
    """Over units; the manifest stays free of them."""
    record = ledger.stage("embed/t5", "f0")
    for unit, waste in (("a", 0.1), ("b", 0.3)):
        timings = {"encode_s": 2.0, "num_retries": 1.0, "padding_waste_fraction": waste}
        outcome = Outcome(timings=timings)
        record.publish(Unit(id=unit), outcome, ledger.store, seconds=1, attempt=1)
    manifest = record.complete("embed/t5", {}, {}, {}, ["a", "b"], "run-1")
    assert manifest.timings == {
        "encode_s": 4.0,
        "num_retries": 2.0,
        "padding_waste_fraction": 0.2,
    }
    assert "timings" not in (record.directory / "manifest.json").read_text()


def test_a_manifest_of_another_format_is_refused(ledger: Ledger) -> None:
    """A store of another version is named, not misread."""
    record = ledger.stage("ingest", "f0")
    write_atomically(record.directory / "manifest.json", '{"format": 1}')
    with pytest.raises(ValueError, match="format must be 2, found 1: made by another version"):
        record.manifest()


def test_no_manifest_while_a_unit_lacks_its_receipt(ledger: Ledger) -> None:
    """A stage is complete only with all its units."""
    record = ledger.stage("ingest", "f0")
    publish(ledger, record)
    with pytest.raises(RetryableError, match=r"receipts/other\.json: .* its receipt is not there"):
        record.complete("ingest", {}, {}, {}, [UNIT.id, "other"], "run-1")
    assert not record.is_complete


def die_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """From now on the process dies at the `step`-th rename, counted from 0."""
    rename, count = os.replace, iter(range(1000))

    def replace(*arguments: Any) -> None:
        if next(count) == step:
            raise Killed
        rename(*arguments)

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_unit_killed_midway_is_not_done_and_can_be_redone(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Whichever rename is the last, there is no receipt; the next attempt gives a whole unit."""
    record = ledger.stage("ingest", "f0")
    with monkeypatch.context() as patch:
        die_at(patch, step)
        with pytest.raises(Killed):
            publish(ledger, record)
    assert record.receipt(UNIT.id) is None
    assert record.done_units() == set()
    publish(ledger, record)
    assert published(record) == {"a.txt", "deep/b.txt", "receipts/train-00000.json"}
    assert record.done_units() == {UNIT.id}


def test_a_stage_killed_before_its_manifest_is_unfinished(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All receipts are there, but nobody takes the stage for complete."""
    record = ledger.stage("ingest", "f0")
    publish(ledger, record)
    with monkeypatch.context() as patch:
        die_at(patch, 0)
        with pytest.raises(Killed):
            record.complete("ingest", {}, {}, {}, [UNIT.id], "run-1")
    assert not record.is_complete
    assert ledger.manifests() == []
    assert record.complete("ingest", {}, {}, {}, [UNIT.id], "run-1").run_id == "run-1"


def test_readers_see_the_old_text_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that dies before its rename leaves the old bytes under the name."""
    path = tmp_path / "deep" / "run.json"
    write_atomically(path, "old")
    with monkeypatch.context() as patch:
        die_at(patch, 0)
        with pytest.raises(Killed):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"


def test_the_identity_is_noted_once(ledger: Ledger) -> None:
    """What a fingerprint stands for is written before any work and then left alone."""
    record = ledger.stage("ingest", "f0")
    assert record.open({"version": 1}, {})
    assert record.open({"version": 2}, {})
    identity = json.loads((record.directory / "identity.json").read_text())["identity"]
    assert identity == {"version": 1}
    assert not record.is_complete


def test_other_contents_of_an_input_undo_a_stage(ledger: Ledger) -> None:
    """The manifest and unfinished work go; receipts stay, for their keys to be judged by."""
    record = ledger.stage("embed/t5", "f0")
    record.open({}, {"ingest": "c1"})
    publish(ledger, record)
    (record.directory / "durable" / UNIT.id).mkdir(parents=True)
    record.complete("embed/t5", {}, {}, {"ingest": "c1"}, [UNIT.id], "run-1")
    assert record.open({}, {"ingest": "c1"})
    assert record.is_complete
    assert not record.open({}, {"ingest": "c2"})
    assert not record.open({}, {"ingest": "c2"})  # a driver died before the receipts were judged
    assert not record.is_complete
    assert not (record.directory / "durable").exists()
    assert record.done_units() == {UNIT.id}


def test_a_unit_is_taken_over_from_an_earlier_fingerprint(ledger: Ledger) -> None:
    """The files are linked, adopted ones named again; deleting the donor leaves them whole."""
    donor, record = ledger.stage("ingest", "f0"), ledger.stage("ingest", "f1")
    receipt = publish(ledger, donor)
    taken = record.take_over(receipt, donor)
    assert taken.taken_from == "f0"
    assert taken.proof() == receipt.proof()
    assert published(record) == published(donor)
    assert (record.directory / "a.txt").samefile(donor.directory / "a.txt")
    shutil.rmtree(donor.directory)
    assert (record.directory / "deep" / "b.txt").read_text() == "bb"
    assert record.receipt(UNIT.id) == taken


def test_publishing_again_takes_the_old_receipt_back_first(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit that dies while it is redone is not done, and its stage is not complete."""
    record = ledger.stage("ingest", "f0")
    publish(ledger, record)
    record.complete("ingest", {}, {}, {}, [UNIT.id], "run-1")
    with monkeypatch.context() as patch:
        die_at(patch, 1)
        with pytest.raises(Killed):
            publish(ledger, record)
    assert not record.is_complete
    assert record.receipt(UNIT.id) is None


def test_manifests_come_newest_first_and_by_name(ledger: Ledger) -> None:
    """Stages of a kind with two-part names are found too."""
    for age, (name, address) in enumerate([("embed/t5", "f2"), ("ingest", "f1"), ("ingest", "f0")]):
        record = ledger.stage(name, address)
        record.open({}, {})
        record.complete(name, {}, {}, {}, [], "run-1")
        made = record.directory / "made.json"
        made.write_text(json.dumps({**json.loads(made.read_text()), "created": f"{9 - age}"}))
    assert [one.fingerprint for one in ledger.manifests()] == ["f2", "f1", "f0"]
    assert [one.fingerprint for one in ledger.manifests("ingest")] == ["f1", "f0"]
    assert [one.stage for one in ledger.manifests("embed/t5")] == ["embed/t5"]


def test_a_kind_of_stages_may_have_a_folder_for_each_model(ledger: Ledger) -> None:
    """Super-resolution models and their experts are found beside the caches."""
    names = {"embed/t5", "super_resolution/sr256", "super_resolution_experts/sr256"}
    for name in names:
        record = ledger.stage(name, "f0")
        record.open({}, {})
        record.complete(name, {}, {}, {}, [], "run-1")
    assert {one.stage for one in ledger.manifests()} == names


def test_a_run_is_found_by_the_beginning_of_its_id(ledger: Ledger) -> None:
    """As long as only one run begins so; otherwise the newest runs are listed."""
    write_run(ledger, "demo-1-aa", started="2026-01-01")
    write_run(ledger, "demo-2-bb", started="2026-01-02")
    assert [record["run_id"] for record in ledger.runs()] == ["demo-2-bb", "demo-1-aa"]
    assert ledger.run("demo-1")["run_id"] == "demo-1-aa"
    with pytest.raises(UserError, match=r"2 runs in .* named 'demo'; newest: demo-2-bb, demo-1"):
        ledger.run("demo")
    with pytest.raises(UserError, match=r"no run in .* named 'x'"):
        ledger.run("x")


def test_a_store_without_runs_says_so(ledger: Ledger) -> None:
    """An empty store has no newest run to offer."""
    assert ledger.runs() == []
    with pytest.raises(UserError, match="newest: none"):
        ledger.run("x")


def test_a_store_must_be_a_place_to_write(tmp_path: Path) -> None:
    """An unknown scheme is named; a place that cannot be made, with the reason."""
    with pytest.raises(UserError, match="got 'nowhere://bucket/store'"):
        Ledger.open("nowhere://bucket/store")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot create or write .*/file/store: Not a directory"):
        Ledger.open(tmp_path / "file" / "store")


def test_looking_at_a_store_does_not_create_it(tmp_path: Path) -> None:
    """`plan` and `status` leave no trace; a file:// address and a path name the same store."""
    assert Ledger.at(f"file://{tmp_path}/store") == Ledger.at(tmp_path / "store")
    assert not (tmp_path / "store").exists()
    assert Ledger.open(tmp_path / "store").store.is_dir()


def test_scratch_directories_never_meet(ledger: Ledger) -> None:
    """Two attempts get two directories, on the store's own file system."""
    first, second = ledger.new_scratch(), ledger.new_scratch()
    assert first != second
    assert first.is_relative_to(ledger.store)
    ledger.discard_scratch(first)
    ledger.discard_scratch(first)  # a second time does no harm
    assert [path.exists() for path in (first, second)] == [False, True]


def test_scratch_of_a_run_goes_as_a_whole(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who still copies from it finds no folder with less and less in it, but none."""
    scratch = ledger.new_scratch("run-1")
    names: list[bool] = []
    monkeypatch.setattr(
        "pipelines.store.ledger.remove_tree", lambda _: names.append(scratch.exists())
    )
    ledger.discard_scratch_of("run-1")
    assert names == [False]


def test_a_worker_beside_a_bucket_clears_what_ended_runs_left(
    s3_store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a machine where no driver starts; what is nobody's, or of a run under way, stays."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ledger = Ledger.open(s3_store)
    write_run(ledger, "over", state="killed")
    write_run(ledger, "on", state="running")
    places = {name: ledger.new_scratch(name) for name in ("over", "on", "unknown", "")}
    ledger.discard_local_scratch_of_ended()
    left = {name for name, path in places.items() if path.exists()}
    assert left == {"on", "unknown", ""}


def test_an_object_store_holds_a_stage(s3_store: str) -> None:
    """Over real HTTP: publish, read back, take over, forget, find, redo."""
    ledger = Ledger.open(s3_store)
    donor, record = ledger.stage("ingest", "f0"), ledger.stage("ingest", "f1")
    for one in (donor, record):
        one.open({}, {})
    receipt = publish(ledger, donor)
    assert donor.receipt(UNIT.id) == receipt
    assert donor.complete("ingest", {}, {}, {}, [UNIT.id], "run-1") == donor.manifest()
    record.take_over(receipt, donor)
    assert record.done_units() == {UNIT.id}
    assert (record.directory / "deep" / "b.txt").read_text() == "bb"
    manifest = record.complete("ingest", {}, {}, {}, [UNIT.id], "run-2")
    assert manifest.location(receipt.files[0]) == f"{s3_store}/ingest/f1/a.txt"
    assert [one.fingerprint for one in ledger.manifests("ingest")] == ["f1", "f0"]
    record.forget(UNIT.id)
    assert not record.is_complete
    assert record.receipt(UNIT.id) is None
    assert [one.stage for one in ledger.manifests()] == ["ingest"]


def test_a_bucket_that_is_not_there_is_named(s3_server: str) -> None:
    """The error says what was to be written where."""
    with pytest.raises(UserError, match="cannot create or write s3://no-such-bucket/x: "):
        Ledger.open("s3://no-such-bucket/x")


# -- what somebody else wrote ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format": 3}', "format must be 2, found 3: a newer version of ediffi made this store"),
        ('{"format": 1}', "format must be 2, found 1: another version of ediffi made this store"),
        ('{"for', "must be a JSON object with a format, found something else"),
        ("[]", "must be a JSON object with a format, found something else"),
    ],
)
def test_a_store_of_another_version_is_not_touched(ledger: Ledger, text: str, words: str) -> None:
    """Nothing is written there; the error says what to do."""
    (ledger.store / "ediffi-store.json").write_text(text)
    with pytest.raises(UserError, match=f"ediffi-store.json: {words}"):
        Ledger.open(ledger.store)
    assert [path.name for path in ledger.store.rglob("*") if path.is_file()] == [
        "ediffi-store.json"
    ]


@pytest.mark.parametrize(
    "words",
    [
        ("status",),
        ("list",),
        ("plan", "demo"),
        ("network", "demo"),
        ("cost",),
        ("compare", "run"),
        ("cancel", "run"),
        ("logs",),
        ("cache", "ls"),
        ("cache", "verify"),
        ("cache", "repair"),
        ("cache", "retry"),
        ("cache", "diff", "a", "b"),
        ("cache", "gc", "--delete", "--older-than", "0m"),
    ],
)
def test_no_command_acts_on_a_store_of_a_newer_version(
    ledger: Ledger, ediffi: Callable[..., tuple], words: tuple[str, ...]
) -> None:
    """It would misread, or remove, what it does not know: a stage that is there stays there."""
    record = ledger.stage("ingest", "0123456789abcdef")
    record.open({}, {})
    (ledger.store / "ediffi-store.json").write_text('{"format": 3}')
    code, _, err = ediffi(*words)
    assert code == 2
    assert "format must be 2, found 3: a newer version of ediffi made this store" in err
    assert record.is_begun


DAMAGES = ['{"unit": "train', "[]", '{"unit": "train-00000", "colour": "blue"}']


def test_an_empty_receipt_is_none(ledger: Ledger) -> None:
    """Its writer died where there are no hard links: the unit is not done, and can be done."""
    record = ledger.stage("ingest", "f0")
    token = lease.take(record.directory, lease.Owner.of_this_process("run-1")).token
    write_atomically(record.directory / "receipts" / f"{UNIT.id}.json", "")
    assert record.receipt(UNIT.id) is None
    assert record.done_units() == set()
    receipt = record.publish(
        UNIT, Outcome(num_in=1), ledger.new_scratch(), seconds=1, attempt=1, token=token
    )
    assert record.receipt(UNIT.id) == receipt


@pytest.mark.parametrize("text", DAMAGES)
def test_a_damaged_receipt_is_named(ledger: Ledger, text: str) -> None:
    """Half there, or foreign: it proves nothing, and the error says how to make the unit again."""
    record = ledger.stage("ingest", "f0")
    publish(ledger, record)
    path = record.directory / "receipts" / f"{UNIT.id}.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"receipts/train-00000\.json: must be .*cache repair"):
        record.receipt(UNIT.id)


@pytest.mark.parametrize("text", ["{", None])
def test_damaged_receipts_of_a_finished_stage_are_named(ledger: Ledger, text: str | None) -> None:
    """Half there or gone: the error says who gathers them again."""
    record = ledger.stage("ingest", "f0")
    publish(ledger, record)
    manifest = record.complete("ingest", {}, {}, {}, [UNIT.id], "run-1")
    path = record.directory / "receipts.jsonl"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=r"receipts\.jsonl: .* must be .*cache repair. gathers"):
        list(manifest.receipts)


@pytest.mark.parametrize("text", [*DAMAGES, "", "null", '{"format": 2, "totals": {}}'])
def test_a_damaged_manifest_is_named(ledger: Ledger, text: str) -> None:
    """The error says how to make it again."""
    record = ledger.stage("ingest", "f0")
    publish(ledger, record)
    record.complete("ingest", {}, {}, {}, [UNIT.id], "run-1")
    (record.directory / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json.*(cache repair|another version)"):
        record.manifest()


def test_a_manifest_without_its_circumstances_is_damaged(ledger: Ledger) -> None:
    """They are written first, so that cannot come from a crash."""
    record = ledger.stage("ingest", "f0")
    record.complete("ingest", {}, {}, {}, [], "run-1")
    (record.directory / "made.json").unlink()
    with pytest.raises(UserError, match=r"made\.json beside it: damaged"):
        record.manifest()


@pytest.mark.parametrize("text", ["", "[]", '{"identity": 1}'])
def test_a_damaged_identity_is_named(ledger: Ledger, text: str) -> None:
    """Without it receipts are judged by their keys: nothing is lost by removing it."""
    record = ledger.stage("ingest", "f0")
    record.open({}, {})
    (record.directory / "identity.json").write_text(text)
    with pytest.raises(UserError, match=r"identity\.json: must say .*remove this file"):
        record.open({}, {})


def test_without_its_identity_receipts_are_judged_by_their_keys(ledger: Ledger) -> None:
    """As the error about a damaged one promises: nobody knows what they were made from."""
    record = ledger.stage("ingest", "f0")
    assert record.open({}, {"list": "c1"})
    publish(ledger, record)
    (record.directory / "identity.json").unlink()
    assert not record.open({}, {"list": "c2"})
    assert not record.is_trusted({"list": "c2"})


def test_a_stage_that_was_only_leased_is_seen(
    ledger: Ledger, demo_recipe: Recipe, use_stages: Callable[..., None]
) -> None:
    """Its driver was killed before it did anything: it is listed, and nothing is taken from it."""
    use_stages(FakeStage(name="ingest"))
    for name in ("ingest", "embed/t5"):
        lease.take(ledger.stage(name, "0" * 16).directory, lease.Owner.of_this_process("run-1"))
    (ledger.store / "ingest" / "notes").mkdir()
    assert sorted(str(one.directory.relative_to(ledger.store)) for one in ledger.records()) == [
        *(f"embed/t5/{'0' * 16}", f"ingest/{'0' * 16}")
    ]
    assert ledger.manifests() == []
    assert [one.earlier for one in plan(demo_recipe, ledger)] == [()]


@pytest.mark.parametrize("text", ["", "[]", '{"run_id": "run-1"}', '{"run_id": "other"}'])
def test_a_damaged_run_record_is_named(ledger: Ledger, text: str) -> None:
    """No stage depends on it, and the error says so."""
    write_run(ledger, "run-1")
    (ledger.store / "runs" / "run-1.json").write_text(text)
    with pytest.raises(UserError, match=r"runs/run-1\.json: must be the record.*move it out"):
        ledger.runs()


# -- leases ---------------------------------------------------------------------------------------


def taken_over(directory: Location) -> tuple[int, int]:
    """Tokens of a driver that lost a stage, and of the one that has it."""
    owner = lease.Owner.of_this_process("run-2")
    first = lease.take(directory, owner)
    first.release()
    return first.token, lease.take(directory, owner).token


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_a_driver_that_lost_the_stage_changes_nothing(
    kind: str, ledger: Ledger, request: pytest.FixtureRequest
) -> None:
    """It publishes no unit, takes none over and writes no manifest; what is there stays."""
    here = Ledger.open(request.getfixturevalue("s3_store")) if kind == "s3" else ledger
    donor, record = here.stage("ingest", "f0"), here.stage("ingest", "f1")
    receipt = publish(here, donor)
    lost, current = taken_over(record.directory)
    with pytest.raises(lease.Fenced, match="has taken the stage over"):
        record.take_over(receipt, donor, token=lost)
    assert record.done_units() == set()
    taken = record.take_over(receipt, donor, token=current)
    manifest = record.complete("ingest", {}, {}, {}, [UNIT.id], "run-2", token=current)
    scratch = here.new_scratch()
    (scratch / "a.txt").write_text("late")
    with pytest.raises(lease.Fenced):
        record.publish(UNIT, Outcome(files=["a.txt"]), scratch, seconds=1, attempt=1, token=lost)
    with pytest.raises(lease.Fenced):
        record.complete("ingest", {}, {}, {}, [UNIT.id], "run-1", token=lost)
    assert record.receipt(UNIT.id) == taken
    assert record.manifest() == manifest
    assert (record.directory / "a.txt").read_text() == "a"


def test_a_receipt_that_came_meanwhile_is_replaced_by_the_holder_alone(ledger: Ledger) -> None:
    """The one who lost the stage finds it and is refused, even past its last look."""
    record = ledger.stage("ingest", "f0")
    _, current = taken_over(record.directory)
    scratch = ledger.new_scratch()

    class Meanwhile(dict[str, object]):
        """Facts that, when they are read, let another receipt come first."""

        def keys(self) -> Any:
            publish(ledger, record)
            return super().keys()

    outcome = Outcome(facts=Meanwhile(mine=True))
    record.publish(UNIT, outcome, scratch, seconds=1, attempt=1, token=current)
    found = record.receipt(UNIT.id)
    assert found is not None
    assert found.facts == {"mine": True}
    assert found.files == ()
