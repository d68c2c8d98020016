"""Tests of benchmarks.plan_scale: the simulated store is one that a plan takes for real."""

from pathlib import Path

import pytest

from benchmarks.plan_scale import measure_plan
from benchmarks.simulated_store import make_store
from pipelines.caches.lookup import stages_of


def test_a_plan_of_a_simulated_store_counts_as_expected(tmp_path: Path) -> None:
    """Half kept, all but a hundredth taken over, everything to do; the process is measured."""
    scene = make_store(tmp_path, 40)
    taken = measure_plan(scene, 40)
    assert taken.seconds > 0
    assert taken.peak_mb > 10
    names = [found.name for found in stages_of(scene.ledger)]
    assert sorted(set(names)) == ["embed/before", "embed/half", "ingest"]


def test_a_wrong_count_is_no_measurement(tmp_path: Path) -> None:
    """A plan that decides otherwise stops the benchmark."""
    scene = make_store(tmp_path, 4)
    with pytest.raises(RuntimeError, match="expected"):
        measure_plan(scene, 6)
