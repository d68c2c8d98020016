"""Stored averages of a scripted run: kept, forgotten after a resume, published, reconstructed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ediffi.power_ema import PowerRecord, gamma_of, reconstruct
from ediffi.train.config import TrainConfig
from ediffi.train.ema import Averages, power_kind
from ediffi.train.engine import Worker
from ediffi.train.power_snapshots import PowerSnapshots
from ediffi.train.state import Fragment
from tests.ediffi.train.toy import CONFIG as TOY
from tests.ediffi.train.toy import Killed, after, make_job, run, run_ranks, weights

# DeepSpeed 0.19 at stage 3 calls what torch 2.14 renames.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning")

BATCH = 10
NUM_STEPS = 120
CONFIG = TrainConfig(
    total_images=BATCH * NUM_STEPS,
    batch_images=BATCH,
    micro_batch_images=BATCH,
    ema_profile="power",
    ema_std=0.08,
    ema_snapshot_images=100,
    checkpoint_images=10**6,
    log_images=10**6,
)
HISTORY = torch.from_numpy(
    np.cumsum(np.random.default_rng(0).standard_normal((NUM_STEPS, 40)), axis=0)
    / np.sqrt(NUM_STEPS)
).float()


class ScriptedRun:
    """Weights that take the rows of HISTORY one after the other, as the training loop would."""

    def __init__(self, directory: Path, rank: int = 0, **changes: Any) -> None:
        config = TrainConfig(**{**vars(CONFIG), **changes})
        worker = Worker(rank, rank + 1, torch.device("cpu"))
        self.fragment = Fragment("weight", 0, torch.zeros(40))
        self.averages = Averages(config, [self.fragment])
        self.snapshots = PowerSnapshots(directory / "power_ema", config, worker)
        self.snapshot_path = directory / "snapshot"

    def whole(self, kind: str) -> dict[str, Tensor]:
        return {"weight": self.averages.tensors()[kind][0].clone()}

    def train(self, steps: Iterator[int] | range) -> None:
        for step in steps:
            self.fragment.weights.copy_(HISTORY[step])
            seen = (step + 1) * BATCH
            self.averages.update(seen)
            if self.snapshots.is_due(seen):
                self.snapshots.store(seen, self.whole)

    def result(self) -> dict[str, Tensor]:
        final = BATCH * NUM_STEPS
        return dict(self.snapshots.result(final, self.whole, self.snapshot_path))


def names(directory: Path) -> list[str]:
    """Files in a folder, in order."""
    return sorted(path.name for path in directory.iterdir())


def test_the_result_is_the_average_of_the_asked_width(tmp_path: Path) -> None:
    """Reconstructed from twelve stored times it is within 1e-3 of the true one."""
    run = ScriptedRun(tmp_path)
    run.train(range(NUM_STEPS))
    edges = np.arange(NUM_STEPS + 1) / NUM_STEPS
    true = np.diff(edges ** (gamma_of(0.08) + 1)) @ HISTORY.double().numpy()
    found = run.result()["weight"].double().numpy()
    assert np.linalg.norm(found - true) < 1e-3 * np.linalg.norm(true)


def test_a_tracked_width_is_the_result_as_it_is(tmp_path: Path) -> None:
    """Nothing is solved for where the average itself is at hand."""
    run = ScriptedRun(tmp_path, ema_std=0.1)
    run.train(range(NUM_STEPS))
    assert torch.equal(run.result()["weight"], run.whole(power_kind(0.1))["weight"])


def test_what_is_published_is_enough_for_any_width(tmp_path: Path) -> None:
    """All stored times are in the snapshot's folder, with a record that names and verifies them."""
    run = ScriptedRun(tmp_path)
    run.train(range(NUM_STEPS))
    result = run.result()
    folder = run.snapshot_path / "power_ema"
    record = PowerRecord.read(folder)
    assert record.times == list(range(100, 1201, 100))
    assert {*names(folder)} == {one.file for one in record.averages} | {"power_ema.json"}
    made = reconstruct(folder, record, std=0.08, images=1200)
    assert torch.equal(made.state["weight"], result["weight"])
    reconstruct(folder, record, std=0.06, images=700)


def test_a_resumed_run_publishes_the_same_bytes(tmp_path: Path) -> None:
    """What was stored after the checkpoint is forgotten, and stored again as it was."""
    whole, resumed = ScriptedRun(tmp_path / "whole"), ScriptedRun(tmp_path / "resumed")
    whole.train(range(NUM_STEPS))
    resumed.train(range(50))
    checkpoint = {kind: tensors[0].clone() for kind, tensors in resumed.averages.tensors().items()}
    resumed.train(range(50, 75))
    assert "images-0000000700.json" in names(tmp_path / "resumed" / "power_ema")

    resumed = ScriptedRun(tmp_path / "resumed")
    resumed.averages.load(lambda kind, name, start, num: checkpoint[kind][start : start + num])
    resumed.snapshots.forget_after(500)
    assert names(tmp_path / "resumed" / "power_ema")[-1].startswith("images-0000000500")
    resumed.train(range(50, NUM_STEPS))

    assert torch.equal(resumed.result()["weight"], whole.result()["weight"])
    folders = [run.snapshot_path / "power_ema" for run in (whole, resumed)]
    assert names(folders[0]) == names(folders[1])
    for name in names(folders[0]):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_an_average_that_a_kill_left_without_its_record_is_forgotten(tmp_path: Path) -> None:
    """Files without a record do not count, and are removed when the run goes on."""
    run = ScriptedRun(tmp_path)
    run.train(range(20))
    folder = tmp_path / "power_ema"
    (folder / "images-0000000200.json").unlink()
    (folder / "images-0000000100-std-0.05.safetensors.part").write_bytes(b"torn")
    run.snapshots.forget_after(200)
    assert {name[:17] for name in names(folder)} == {"images-0000000100"}


def test_only_rank_0_writes(tmp_path: Path) -> None:
    """Other ranks take part in gathering and leave no file."""
    run = ScriptedRun(tmp_path, rank=1)
    run.train(range(NUM_STEPS))
    assert run.result() == {}
    assert list(tmp_path.iterdir()) == []


def test_with_a_half_life_nothing_is_stored(tmp_path: Path) -> None:
    """The one average is the result."""
    run = ScriptedRun(tmp_path, ema_profile="half_life", ema_half_life_images=100)
    run.train(range(NUM_STEPS))
    assert torch.equal(run.result()["weight"], run.whole("ema")["weight"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("every_images", "num_times"), [(0, 1), (600, 2), (95, 13)])
def test_averages_are_stored_when_due_and_at_the_end(
    tmp_path: Path, every_images: int, num_times: int
) -> None:
    """0 means only the end; a multiple inside a batch is stored when that batch ends."""
    run = ScriptedRun(tmp_path, ema_snapshot_images=every_images)
    run.train(range(NUM_STEPS))
    run.result()
    times = PowerRecord.read(run.snapshot_path / "power_ema").times
    assert len(times) == num_times
    assert times[-1] == BATCH * NUM_STEPS


POWER = {
    "ema_profile": "power",
    "ema_half_life_images": 0,
    "ema_std": 0.08,
    "ema_snapshot_images": 32,
}


def test_a_killed_training_publishes_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    """The loop stores, forgets and reconstructs so that every published byte is the same."""
    config = TrainConfig(**{**vars(TOY), **POWER})
    whole, killed = (make_job(tmp_path / name, config=config) for name in ("whole", "killed"))
    run(whole)
    with pytest.raises(Killed):
        run(killed, after(5, Killed))
    run(killed)
    files = [path.relative_to(whole.snapshot_path) for path in whole.snapshot_path.rglob("*.*")]
    assert len(files) == 2 + 2 * 3 + 1
    for file in files:
        assert (whole.snapshot_path / file).read_bytes() == (
            killed.snapshot_path / file
        ).read_bytes()


@pytest.mark.slow
def test_ranks_average_and_store_their_shares_together(tmp_path: Path) -> None:
    """Two ranks with sharded weights publish what one rank does, up to rounding."""
    changes = {**POWER, "zero_stage": 3}
    one = make_job(tmp_path / "one", config=TrainConfig(**{**vars(TOY), **changes}))
    run(one)
    two = make_job(tmp_path / "two")
    run_ranks(2, [{"directory": tmp_path / "two", "config": changes}])
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(two)[name], weight, atol=1e-5, rtol=1e-4)
    assert PowerRecord.read(two.snapshot_path / "power_ema").times == [32, 64, 96]
