"""Tests of cluster.doctor: a whole visit."""

import sys
from pathlib import Path

from cluster import doctor


def test_whole_visit_imports_nothing_heavy(tmp_path: Path) -> None:
    """Every question is asked once, and none of them loads what it asks about."""
    heavy = {"ray", "mlflow", "deepspeed"} - sys.modules.keys()
    needs = doctor.Needs(
        disk_path=tmp_path,
        lock_path=tmp_path / "requirements.lock",
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
        weights={"t5": "package:json"},
    )
    findings = doctor.examine(needs)
    names = [finding.name for finding in findings]
    assert len(set(names)) == len(names) == 10
    assert not heavy & sys.modules.keys()
