"""A small pipeline and what an undisturbed run of it leaves: shared, for it costs a Ray start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.chaos import audit
from benchmarks.chaos.scene import Scene, short_scene
from pipelines.store.ledger import Ledger


@dataclass(frozen=True)
class Calm:
    """The scene, and the bytes that every store must hold in the end."""

    scene: Scene
    folder: Path
    digests: Mapping[str, str]


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calm]:
    """Run once without any disturbance."""
    folder = tmp_path_factory.mktemp("chaos")
    with short_scene(folder) as scene:
        place = folder / "undisturbed"
        scene.run(str(place / "store"), place)
        ledger = Ledger.at(place / "store")
        digests = audit.digests(ledger)
        assert len(digests) > 40
        assert audit.problems(ledger, place, digests) == []
        assert audit.num_begun(ledger) == audit.num_units(ledger)
        yield Calm(scene, folder, digests)
