"""Every question of the doctor, answered both ways."""

import sqlite3
import stat
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest

from cluster import doctor

TOO_MUCH = 1e9  # GiB, cores: more than any machine has


@pytest.fixture
def health_server() -> Iterator[str]:
    """Serve 200 at /health and 404 elsewhere, as an MLflow server does; yield its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_old_python_is_told_what_to_do() -> None:
    """3.10 is refused with a remedy, 3.11 is fine."""
    assert not doctor.check_python((3, 10, 14)).ok
    assert doctor.check_python((3, 11, 0)).ok


def test_standard_library_is_not_shadowed() -> None:
    """The `dataclasses` backport in site-packages does not win over the standard library."""
    finding = doctor.check_standard_library()
    assert finding.ok, finding.found


def test_packages_as_locked(tmp_path: Path) -> None:
    """Comments, and packages for other platforms, do not count against the machine."""
    lock = tmp_path / "requirements.lock"
    lock.write_text(
        f"# a comment\npytest=={version('pytest')}\n"
        'no-such-package-anywhere==1.0 ; platform_system == "Plan9"\n'
    )
    finding = doctor.check_packages(lock)
    assert finding.ok
    assert finding.found == "2 of 2 as in requirements.lock"


def test_packages_that_differ_are_named(tmp_path: Path) -> None:
    """A wrong version and a missing package are both told, with the command that mends them."""
    lock = tmp_path / "requirements.lock"
    lock.write_text("pytest==0.0.1\nno-such-package-anywhere==1.0\n")
    finding = doctor.check_packages(lock)
    assert not finding.ok
    assert f"pytest {version('pytest')} (locked 0.0.1)" in finding.found
    assert "no-such-package-anywhere missing" in finding.found
    assert f"install -r {lock}" in finding.remedy


def test_missing_lock_file_is_a_finding(tmp_path: Path) -> None:
    """Without a lock file there is nothing to compare with, which is no reason to crash."""
    assert not doctor.check_packages(tmp_path / "requirements.lock").ok


def test_machine_too_small() -> None:
    """Cores, memory and shared memory are found, and too few of them are refused."""
    assert doctor.check_cpus(1).ok
    assert not doctor.check_cpus(int(TOO_MUCH)).ok
    assert doctor.check_memory(0.1).ok
    assert not doctor.check_memory(TOO_MUCH).ok


def test_shared_memory(tmp_path: Path) -> None:
    """Too little is refused with the container's option; a machine without it is fine."""
    assert doctor.check_shared_memory(0.0, tmp_path).ok
    assert "--shm-size" in doctor.check_shared_memory(TOO_MUCH, tmp_path).remedy
    assert doctor.check_shared_memory(TOO_MUCH, tmp_path / "missing").ok


@pytest.mark.parametrize(("required", "ok"), [(0, True), (2, True), (3, False)])
def test_accelerators_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, required: int, ok: bool
) -> None:
    """Each line of nvidia-smi is one device."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'H100, 81559 MiB, 570.1'\necho 'H100, 81559 MiB, 570.1'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    finding = doctor.check_accelerators(required)
    assert finding.ok is ok
    assert finding.found.count("H100") == 2


def test_no_accelerators_needed_none_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without nvidia-smi is fine for a run that asks for no accelerator."""
    monkeypatch.setenv("PATH", "")
    assert doctor.check_accelerators(0).ok
    assert not doctor.check_accelerators(1).ok


def test_store_is_probed_and_left_clean(tmp_path: Path) -> None:
    """A writable store is fine, before it exists too, and the probe leaves nothing behind."""
    assert doctor.check_store(tmp_path).ok
    assert doctor.check_store(tmp_path / "new" / "store").ok
    assert list(tmp_path.iterdir()) == []


def test_store_that_ignores_exclusive_create(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system on which two creators win is refused: leases would mean nothing."""
    honest = doctor.os.open
    monkeypatch.setattr(
        doctor.os, "open", lambda path, flags: honest(path, flags & ~doctor.os.O_EXCL)
    )
    finding = doctor.check_store(tmp_path)
    assert not finding.ok
    assert "two creators won" in finding.found
    assert list(tmp_path.iterdir()) == []


def test_store_that_cannot_be_written() -> None:
    """A read-only place is a finding with the system's reason, not a traceback."""
    if not Path("/proc/self").is_dir():
        pytest.skip("needs /proc, which not even root can write to")
    assert not doctor.check_store(Path("/proc/self/store")).ok


def test_free_disk(tmp_path: Path) -> None:
    """The disk is asked where the store will be, although it is not there yet."""
    assert doctor.check_free_disk(tmp_path / "new" / "store", 0.0).ok
    assert "free " in doctor.check_free_disk(tmp_path / "new" / "store", TOO_MUCH).remedy


def test_tracking_database(tmp_path: Path) -> None:
    """A new database and an existing one are fine; neither is created or changed."""
    path = tmp_path / "mlflow.db"
    assert doctor.check_tracking(f"sqlite:///{path}").ok
    assert not path.exists()
    sqlite3.connect(path).execute("CREATE TABLE t (x)").connection.close()
    before = path.read_bytes()
    assert doctor.check_tracking(f"sqlite:///{path}").ok
    assert path.read_bytes() == before


def test_tracking_file_that_is_no_database(tmp_path: Path) -> None:
    """Any other file under the database's name is refused."""
    path = tmp_path / "mlflow.db"
    path.write_text("not a database, but longer than the sixteen bytes of a header" * 10)
    assert not doctor.check_tracking(f"sqlite:///{path}").ok


def test_tracking_server(health_server: str) -> None:
    """A server that answers /health is fine; one that does not, or is not there, is not."""
    assert doctor.check_tracking(health_server).ok
    assert not doctor.check_tracking(f"{health_server}/elsewhere").ok
    assert not doctor.check_tracking("http://127.0.0.1:1", timeout_s=1.0).ok


def test_tracking_never_shows_a_password() -> None:
    """Credentials in a URI stay out of the finding, reachable or not."""
    uris = [
        "http://user:hunter2@127.0.0.1:1",
        "postgresql://user:hunter2@127.0.0.1/mlflow",
        "postgresql+psycopg2://user:hunter2@127.0.0.1/mlflow",
        "ftp://user:hunter2@127.0.0.1/",
    ]
    for uri in uris:
        assert "hunter2" not in repr(doctor.check_tracking(uri, timeout_s=1.0))


def test_tracking_folder_is_refused() -> None:
    """MLflow's plain folders are gone: the finding says what to use instead."""
    assert "sqlite:///" in doctor.check_tracking("/tmp/mlruns").remedy


def test_weights_on_disk_and_in_packages(tmp_path: Path) -> None:
    """A file, a filled folder and an installed module are at hand; an empty folder is not."""
    assert not doctor.check_weights("t5", str(tmp_path)).ok
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert doctor.check_weights("t5", str(tmp_path)).ok
    assert doctor.check_weights("t5", str(tmp_path / "model.safetensors")).ok
    assert doctor.check_weights("t5", "package:json").ok
    assert not doctor.check_weights("t5", "package:no_such_module_anywhere").ok
    assert not doctor.check_weights("t5", "package:").ok


def test_weights_in_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub name is looked for in the cache, and the remedy is the command that fetches it."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert (
        "hf download google/t5-v1_1-xxl" in doctor.check_weights("t5", "google/t5-v1_1-xxl").remedy
    )
    (tmp_path / "models--google--t5-v1_1-xxl" / "snapshots" / "abc").mkdir(parents=True)
    assert doctor.check_weights("t5", "google/t5-v1_1-xxl").ok


def test_whole_visit_imports_nothing_heavy(tmp_path: Path) -> None:
    """Every question is asked once, and none of them loads what it asks about."""
    heavy = {"ray", "mlflow", "deepspeed"} - sys.modules.keys()
    needs = doctor.Needs(
        store_path=tmp_path,
        lock_path=tmp_path / "requirements.lock",
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
        weights={"t5": "package:json"},
    )
    findings = doctor.examine(needs)
    names = [finding.name for finding in findings]
    assert len(set(names)) == len(names) == 11
    assert not heavy & sys.modules.keys()
