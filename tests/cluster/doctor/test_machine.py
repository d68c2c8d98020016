"""Tests of cluster.doctor.machine: every question, answered both ways."""

import stat
from importlib.metadata import version
from pathlib import Path

import pytest

from cluster.doctor import machine

TOO_MUCH = 1e9  # GiB, cores: more than any machine has


def test_old_python_is_told_what_to_do() -> None:
    """3.10 is refused with a remedy, 3.11 is fine."""
    assert not machine.check_python((3, 10, 14)).ok
    assert machine.check_python((3, 11, 0)).ok


def test_standard_library_is_not_shadowed() -> None:
    """The `dataclasses` backport in site-packages does not win over the standard library."""
    finding = machine.check_standard_library()
    assert finding.ok, finding.found


def test_packages_as_locked(tmp_path: Path) -> None:
    """Comments, and packages for other platforms, do not count against the machine."""
    lock = tmp_path / "requirements.lock"
    lock.write_text(
        f"# a comment\npytest=={version('pytest')}\n"
        'no-such-package-anywhere==1.0 ; platform_system == "Plan9"\n'
    )
    finding = machine.check_packages(lock)
    assert finding.ok
    assert finding.found == "2 of 2 as in requirements.lock"


def test_packages_that_differ_are_named(tmp_path: Path) -> None:
    """A wrong version and a missing package are both told, with the command that mends them."""
    lock = tmp_path / "requirements.lock"
    lock.write_text("pytest==0.0.1\nno-such-package-anywhere==1.0\n")
    finding = machine.check_packages(lock)
    assert not finding.ok
    assert f"pytest {version('pytest')} (locked 0.0.1)" in finding.found
    assert "no-such-package-anywhere missing" in finding.found
    assert f"install -r {lock}" in finding.remedy


def test_missing_lock_file_is_a_finding(tmp_path: Path) -> None:
    """Without a lock file there is nothing to compare with, which is no reason to crash."""
    assert not machine.check_packages(tmp_path / "requirements.lock").ok


def test_machine_too_small() -> None:
    """Cores, memory and shared memory are found, and too few of them are refused."""
    assert machine.check_cpus(1).ok
    assert not machine.check_cpus(int(TOO_MUCH)).ok
    assert machine.check_memory(0.1).ok
    assert not machine.check_memory(TOO_MUCH).ok


def test_shared_memory(tmp_path: Path) -> None:
    """Too little is refused with the container's option; a machine without it is fine."""
    assert machine.check_shared_memory(0.0, tmp_path).ok
    assert "--shm-size" in machine.check_shared_memory(TOO_MUCH, tmp_path).remedy
    assert machine.check_shared_memory(TOO_MUCH, tmp_path / "missing").ok


@pytest.mark.parametrize(("required", "ok"), [(0, True), (2, True), (3, False)])
def test_accelerators_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, required: int, ok: bool
) -> None:
    """Each line of nvidia-smi is one device."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'H100, 81559 MiB, 570.1'\necho 'H100, 81559 MiB, 570.1'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    finding = machine.check_accelerators(required)
    assert finding.ok is ok
    assert finding.found.count("H100") == 2


def test_no_accelerators_needed_none_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without nvidia-smi is fine for a run that asks for no accelerator."""
    monkeypatch.setenv("PATH", "")
    assert machine.check_accelerators(0).ok
    assert not machine.check_accelerators(1).ok


def test_free_disk(tmp_path: Path) -> None:
    """The disk is asked where the store will be, although it is not there yet."""
    assert machine.check_free_disk(tmp_path / "new" / "store", 0.0).ok
    assert "free " in machine.check_free_disk(tmp_path / "new" / "store", TOO_MUCH).remedy
