"""Tests of pipelines.commands.doctor_store: stores that do, and stores that do not."""

import json
import os
import time
from pathlib import Path

import pytest
import s3fs

from cluster.profile import Profile
from pipelines.cli import main
from pipelines.commands.doctor_store import check_shared, check_store
from pipelines.store import location
from pipelines.store.ledger import Ledger
from tests.conftest import S3_PORT
from tests.pipelines.failing_store import failing_store


def test_a_directory_is_tried_and_left_clean(tmp_path: Path) -> None:
    """A writable one is fine, before it exists too; nothing is left behind."""
    for place in (tmp_path, tmp_path / "new" / "store"):
        store, clock = check_store(Ledger.at(place))
        assert (store.name, store.ok) == ("store", True), store.found
        assert (clock.name, clock.ok) == ("store's clock", True), clock.found
        assert list(tmp_path.iterdir()) == []


def test_a_bucket_is_tried(s3_store: str) -> None:
    """With conditional writes and the clock of the object store; it is left empty."""
    ledger = Ledger.at(s3_store)
    store, clock = check_store(ledger)
    assert store.ok, store.found
    assert clock.ok, clock.found
    assert not ledger.store.exists()


def test_a_store_where_two_creators_win_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leases would mean nothing there: the finding says which stores do."""

    def replace_it(source: Path, target: Path) -> None:
        target.write_text(source.read_text())

    monkeypatch.setattr(location.os, "link", replace_it)
    (store,) = check_store(Ledger.at(tmp_path))
    assert not store.ok
    assert "the second must be refused" in store.found
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written() -> None:
    """The system's reason and a remedy, not a traceback."""
    if not Path("/proc/self").is_dir():
        pytest.skip("needs /proc, which not even root can write to")
    (store,) = check_store(Ledger.at("/proc/self/store"))
    assert not store.ok
    assert store.remedy


def test_an_error_without_words_is_told_with_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a library's own timeout may be."""

    def fails(place: object) -> None:
        raise TimeoutError

    monkeypatch.setattr("pipelines.commands.doctor_store.check_exclusive_create", fails)
    (store,) = check_store(Ledger.at(tmp_path))
    assert "cannot create or write" in store.found
    assert "TimeoutError" in store.found


def test_a_bucket_that_is_not_there(s3_store: str) -> None:
    """Named, with what to do."""
    (store,) = check_store(Ledger.at("s3://absent-bucket/x"))
    assert not store.ok
    assert "absent-bucket" in store.found


def test_a_store_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    """Before anything is written to it."""
    (tmp_path / "ediffi-store.json").write_text(json.dumps({"format": 99}))
    (store,) = check_store(Ledger.at(tmp_path))
    assert not store.ok
    assert "a newer version" in store.found
    assert [path.name for path in tmp_path.iterdir()] == ["ediffi-store.json"]


def test_a_clock_that_is_off_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file server whose files are of ten minutes ago."""
    honest = location.write_atomically

    def stale(place: Path, text: str) -> None:
        honest(place, text)
        if place.exists():
            os.utime(place, (time.time() - 600,) * 2)

    monkeypatch.setattr(location, "write_atomically", stale)
    store, clock = check_store(Ledger.at(tmp_path))
    assert store.ok
    assert not clock.ok
    assert "behind ours" in clock.found


def test_a_bucket_where_two_creators_win_is_refused(
    s3_store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that takes conditional writes for plain ones, through the whole command."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with failing_store(S3_PORT) as (port, faults):
        faults.ignores_conditions = True
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        s3fs.S3FileSystem.clear_instance_cache()
        code = main(["doctor", "--store", s3_store, "--json"])
    s3fs.S3FileSystem.clear_instance_cache()
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (store,) = [one for one in findings if one["name"] == "store"]
    assert (code, store["ok"]) == (1, False)
    assert "the second must be refused" in store["found"]
    assert store["remedy"]


def test_a_store_that_the_place_does_not_share(tmp_path: Path) -> None:
    """Told with what is shared; buckets, and folders below a shared path, are fine."""
    values = {"kind": "ray", "ray": {"address": "http://10.0.0.5:1"}, "shared_paths": ["/shared"]}
    place = Profile.from_mapping("far", values)
    (finding,) = check_shared(place, Ledger.at(tmp_path))
    assert not finding.ok
    assert "which far does not share (shared: /shared)" in finding.found
    assert check_shared(place, Ledger.at("/shared/store")) == []
