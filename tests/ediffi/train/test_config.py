"""Training settings: validation, micro-batches, the learning rate's closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ediffi.train.config import TrainConfig


def make(**changes: Any) -> TrainConfig:
    """A valid config of 1000 images at batch 100, changed."""
    settings = {
        "total_images": 1000,
        "batch_images": 100,
        "micro_batch_images": 50,
        "lr": 2.0,
        "ema_half_life_images": 100,
        "checkpoint_images": 100,
        "log_images": 100,
    }
    return TrainConfig(**(settings | changes))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("total_images", 0),
        ("lr", 0.0),
        ("lr", math.nan),
        ("beta2", 1.0),
        ("zero_stage", 4),
        ("precision", "fp16"),
        ("lr_schedule", "step"),
        ("warmup_images", 1000),
        ("micro_batch_images", 30),
        ("seed", -1),
    ],
)
def test_invalid_setting_is_named(field: str, value: Any) -> None:
    """The error names the field and the value found."""
    with pytest.raises(ValueError, match=rf"{field}.*{value}"):
        make(**{field: value})


def test_micro_batch_is_an_upper_bound() -> None:
    """A rank with fewer images than one micro-batch takes them all in one."""
    assert [make().micro_batch(world_size) for world_size in (1, 2, 4)] == [50, 50, 25]


def test_batch_must_divide_among_ranks() -> None:
    """100 images do not divide among three ranks, and the error says so."""
    with pytest.raises(ValueError, match="multiple of the 3 ranks, got 100"):
        make().micro_batch(3)


@pytest.mark.parametrize(("total", "final"), [(1, 100), (100, 100), (101, 200)])
def test_final_images_are_whole_batches(total: int, final: int) -> None:
    """The total is rounded up to a multiple of the batch."""
    assert make(total_images=total).final_images == final


def test_warmup_is_linear_from_zero() -> None:
    """The rate grows in proportion to the images seen, then stays."""
    config = make(warmup_images=200)

    assert [config.lr_at(images) for images in (0, 50, 100, 200, 999)] == [0, 0.5, 1, 2, 2]


def test_decay_reaches_zero_at_the_end() -> None:
    """Linear and cosine fall from the full rate after warm-up, by half midway, to zero."""
    for schedule in ("linear", "cosine"):
        config = make(warmup_images=200, lr_schedule=schedule)
        assert [config.lr_at(images) for images in (200, 600, 1000)] == pytest.approx([2, 1, 0])
    assert config.lr_at(400) == pytest.approx(1 + math.cos(math.pi / 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema_half_life_images": 0}, "ema_half_life_images must be at least 1, got 0"),
        ({"spike_factor": 0.5}, r"spike_factor must be 0 \(off\) or greater than 1, got 0.5"),
        ({"on_spike": "pray"}, "on_spike must be one of stop, skip, rollback, lower_rate"),
        ({"held_out_samples": 1}, "held_out_samples must be at least 2, got 1"),
        ({"compile": True, "zero_stage": 3}, "compile must be false at zero_stage 3, got True"),
        ({"offload_optimizer": "cpu"}, "offload_optimizer must be none at zero_stage 0"),
        ({"offload_optimizer": "disk", "zero_stage": 1}, "must be one of none, cpu, got 'disk'"),
        (
            {"offload_parameters": "cpu", "zero_stage": 2},
            "offload_parameters must be none below zero_stage 3, got 'cpu'",
        ),
        ({"ema_profile": "power", "ema_std": 0.3}, "ema_std must be between 0 and 0.28"),
        ({"ema_profile": "power", "ema_track_stds": (0.1,)}, "ema_track_stds must be two or more"),
        ({"ema_profile": "power", "ema_track_stds": (0.1, 0.1)}, "ema_track_stds must be two"),
    ],
)
def test_settings_that_contradict_are_named(changes: dict[str, Any], message: str) -> None:
    """What one setting rules out of another is said with both."""
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_power_average_needs_no_half_life() -> None:
    """Each profile asks only for what is its own."""
    assert make(ema_profile="power", ema_half_life_images=0).ema_track_stds == (0.05, 0.10)
