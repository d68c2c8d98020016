"""Checkpoints are complete or passed over, whatever is torn."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ediffi.train.checkpoint import CheckpointStore, Progress
from ediffi.train.config import TrainConfig
from ediffi.train.ema import EMA
from ediffi.train.engine import join_process_group, make_engine, take_step


class Training:
    """A linear layer under DeepSpeed, its average, and a store."""

    def __init__(self, directory: Path, *, zero_stage: int = 0) -> None:
        config = TrainConfig(
            total_images=8,
            batch_images=4,
            micro_batch_images=4,
            lr=0.1,
            ema_half_life_images=8,
            zero_stage=zero_stage,
            checkpoint_images=4,
            log_images=4,
        )
        worker = join_process_group()
        module = nn.Linear(3, 3)
        nn.init.eye_(module.weight)
        nn.init.zeros_(module.bias)
        self.engine = make_engine(module, config, worker)
        self.ema = EMA(module)
        self.store = CheckpointStore(directory, keep=2, worker=worker)

    def step(self) -> None:
        """Take one optimizer step."""
        self.engine.backward(self.engine(torch.ones(4, 3)).square().mean())
        take_step(self.engine, grad_clip=1.0)
        self.ema.update(0.5)

    def save(self, *images_seen: int) -> None:
        """Save a checkpoint for each count, one step apart."""
        for images in images_seen:
            self.step()
            self.store.save(self.engine, self.ema, Progress(images_seen=images, loss=0.25))

    def load(self) -> Progress:
        """Load the newest sound checkpoint."""
        return self.store.load_newest(self.engine, self.ema)

    @property
    def weight(self) -> torch.Tensor:
        """Current weight."""
        return self.engine.module.weight.detach().clone()


def names(directory: Path) -> list[str]:
    """Everything in the directory, hidden or not."""
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_round_trip(tmp_path: Path, zero_stage: int) -> None:
    """Weights, average, optimizer state and progress come back; the next step is the same."""
    training = Training(tmp_path, zero_stage=zero_stage)
    training.save(100)
    average = {name: tensor.clone() for name, tensor in training.ema.gather().items()}
    training.step()

    other = Training(tmp_path, zero_stage=zero_stage)
    assert other.load() == Progress(images_seen=100, loss=0.25)

    assert all(torch.equal(tensor, average[name]) for name, tensor in other.ema.gather().items())
    other.step()
    assert torch.equal(other.weight, training.weight)


def test_nothing_to_load(tmp_path: Path) -> None:
    """An empty directory is the beginning of training."""
    assert Training(tmp_path).load().images_seen == 0


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    """Two of three stay; they sort by number, not by text."""
    Training(tmp_path).save(20, 100, 1000)

    assert names(tmp_path) == ["images-0000000100", "images-0000001000"]


def cut(path: Path) -> None:
    """Lose the second half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def unlink(path: Path) -> None:
    """Lose a file."""
    path.unlink()


@pytest.mark.parametrize("damage", [cut, unlink])
@pytest.mark.parametrize(
    "name", ["complete.json", "ema.safetensors", "state/mp_rank_00_model_states.pt"]
)
def test_damaged_newest_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None]
) -> None:
    """The one before is loaded, and the log names the checkpoint and the file."""
    training = Training(tmp_path)
    training.save(100, 200)
    damage(tmp_path / "images-0000000200" / name)

    with caplog.at_level(logging.WARNING):
        progress = training.load()

    assert progress.images_seen == 100
    assert "images-0000000200" in caplog.text
    assert name in caplog.text


def test_damaged_checkpoint_is_replaced_when_training_gets_there_again(tmp_path: Path) -> None:
    """Saving under the name of a damaged checkpoint makes it sound."""
    training = Training(tmp_path)
    training.save(100, 200)
    unlink(tmp_path / "images-0000000200" / "ema.safetensors")
    training.save(200)

    assert training.load().images_seen == 200


def test_leftovers_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    """A partial directory of an earlier attempt neither counts nor stays."""
    (tmp_path / ".partial-300-dead" / "state").mkdir(parents=True)

    assert Training(tmp_path).load().images_seen == 0
    assert names(tmp_path) == []


def test_another_zero_stage_is_refused(tmp_path: Path) -> None:
    """The error tells what was written by what, and the remedy."""
    Training(tmp_path, zero_stage=2).save(100)

    with pytest.raises(ValueError, match=r"1 ranks at zero_stage 2.*by 1 at zero_stage 0.*delete"):
        Training(tmp_path, zero_stage=0).load()


class Payload:
    """Pickles into a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code ran')",))


def test_checkpoint_files_cannot_run_code(tmp_path: Path) -> None:
    """DeepSpeed's own files are read without its unrestricted unpickling."""
    path = tmp_path / "evil.pt"
    torch.save({"module": Payload()}, path)

    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        Training(tmp_path / "store").engine.checkpoint_engine.load(str(path))
