"""Runs of the toy of `ranks` by one and by two processes, made once for all tests that ask."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import ediffi
from tests.ediffi.train import ranks


@dataclass(frozen=True)
class Tour:
    """Where some ranks left checkpoints, by setting, and what they found; see `ranks.tour`."""

    path: Path
    begun: dict[str, Any]
    found: dict[str, Any]


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Tour:
    """Every setting trained by this process."""
    path = tmp_path_factory.mktemp("one_rank")
    return Tour(path, {name: ranks.begin(path, name) for name in ranks.SETTINGS}, {})


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, one_rank: Tour) -> Tour:
    """Every setting trained by two processes, which also go on from what one left."""
    path = tmp_path_factory.mktemp("two_ranks")
    found = _run_two(path, one_rank.path)
    return Tour(path, found["begun"], found)


def _run_two(own: Path, other: Path) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(ediffi.__file__).parents[1]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, ranks.__file__, str(own), str(other)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:  # a rank whose peer has died waits for it
        for process in processes:
            process.kill()
    for process, (_, narration) in zip(processes, outputs):
        assert process.returncode == 0, narration
    found = [json.loads(printed.splitlines()[-1]) for printed, _ in outputs]
    assert found[0] == found[1], "both ranks see the same norms and whole weights"
    return found[0]
