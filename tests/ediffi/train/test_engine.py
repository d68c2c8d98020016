"""One optimizer step: clipping, refusing, accumulating; and what the engine will not do."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ediffi.train.config import TrainConfig
from ediffi.train.engine import join_process_group, make_engine
from tests.ediffi.train.conftest import Tour
from tests.ediffi.train.ranks import SETTINGS, Toy, refusals, training

# DeepSpeed 0.19 at stage 3 calls what torch 2.14 renames.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning")


def assert_refused(found: dict[str, Any], norms: list[float]) -> None:
    """Nothing changed in the refused steps, and the next one is that of an undisturbed run."""
    assert found["taken"] == [False, False, True]
    assert found["unchanged"]
    assert found["num_steps"] == 2
    assert found["norms"][1] == math.inf
    assert found["norms"][2] == pytest.approx(norms[1], rel=2e-6)
    # Once a step, also for the one that is not finite.
    assert found["asked"] == [pytest.approx(norms[0], rel=2e-6), *found["norms"]]


@pytest.mark.parametrize("name", SETTINGS)
def test_refused_steps_change_no_bit(tmp_path: Path, one_rank: Tour, name: str) -> None:
    """Neither a gradient that the guard refuses nor one that is nan touches weights or moments."""
    assert_refused(refusals(tmp_path, name), one_rank.begun["0"]["norms"])


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_refuse_together(one_rank: Tour, two_ranks: Tour, name: str) -> None:
    """Both ranks leave out a step whose gradient is nan on one of them."""
    assert_refused(two_ranks.found["refused"][name], one_rank.begun["0"]["norms"])


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_refusal_is_not_told_by_deepspeed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], zero_stage: int
) -> None:
    """The guard speaks for itself, once; DeepSpeed's own words on it would be noise."""
    with training(tmp_path, zero_stage=zero_stage) as run:
        run.step(poison=True)

    printed = capfd.readouterr()
    assert "OVERFLOW" not in printed.out + printed.err
    assert "untested" not in printed.out + printed.err


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_gradient_is_clipped_to_the_limit(tmp_path: Path, zero_stage: int) -> None:
    """Adam's first moment after a step is a tenth of a gradient with the largest norm allowed."""
    with training(tmp_path, zero_stage=zero_stage, grad_clip=0.5) as run:
        step = run.step()

        moment = torch.cat(run.state.tensors()["exp_avg"])
        assert step.grad_norm > 0.5
        assert moment.norm().item() == pytest.approx(0.1 * 0.5, rel=1e-4)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_micro_batches_give_the_gradient_of_the_batch(tmp_path: Path, zero_stage: int) -> None:
    """Four micro-batches of two, and one of eight."""
    norms = []
    for micro_batch_images in (2, 8):
        changes = {"zero_stage": zero_stage, "micro_batch_images": micro_batch_images}
        with training(tmp_path / str(micro_batch_images), **changes) as run:
            norms.append(run.norms(2))

    assert norms[0] == pytest.approx(norms[1], rel=2e-6)


def engine_of(denoiser: nn.Module, **changes: Any) -> Any:
    """Make an engine of one step of eight images."""
    config = TrainConfig(
        **{
            "total_images": 8,
            "batch_images": 8,
            "ema_half_life_images": 8,
            "checkpoint_images": 8,
            "log_images": 8,
            **changes,
        }
    )
    return make_engine(denoiser, config, join_process_group(), math.isfinite)


def test_gradient_checkpointing_needs_a_network_that_can() -> None:
    """The setting is handed to the network; one that does not know it is refused."""
    with pytest.raises(ValueError, match="gradient_checkpointing must be false for a Sequential"):
        engine_of(Toy(), gradient_checkpointing=True)

    toy = Toy()
    toy.network.gradient_checkpointing = False
    engine_of(toy, gradient_checkpointing=True).destroy()
    assert toy.network.gradient_checkpointing is True


def test_bf16_is_the_networks_alone() -> None:
    """The network computes in bf16; weights stay float32 and names as they were."""
    toy = Toy()
    names = [name for name, _ in toy.network.named_parameters()]
    engine = engine_of(toy, precision="bf16")
    try:
        assert engine(torch.ones(1, 5)).dtype == torch.bfloat16
        assert {parameter.dtype for parameter in toy.parameters()} == {torch.float32}
        assert [name for name, _ in toy.network.named_parameters()] == names
    finally:
        engine.destroy()


def test_other_words_of_deepspeed_are_heard(caplog: pytest.LogCaptureFixture) -> None:
    """Only what is meant so is left out of the log."""
    engine_of(Toy()).destroy()
    logger = logging.getLogger("DeepSpeed")
    before, logger.propagate = logger.propagate, True
    try:
        logger.warning("the disk is slow")
        logger.warning("**** You are using ZeRO with an untested optimizer")
    finally:
        logger.propagate = before
    assert set(caplog.messages) == {"the disk is slow"}
