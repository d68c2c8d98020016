"""Tests of ediffi.train.guard: which steps are refused, and what each policy does then."""

import math
from dataclasses import replace

import pytest

from ediffi.train.checkpoint import Progress
from ediffi.train.config import TrainConfig
from ediffi.train.guard import HORIZON_STEPS, WARMUP_STEPS, SpikeGuard, TrainingDiverged

BATCH = 16
CONFIG = TrainConfig(
    total_images=10_000,
    batch_images=BATCH,
    micro_batch_images=BATCH,
    checkpoint_images=100,
    log_images=100,
    ema_half_life_images=100,
    spike_factor=5.0,
    on_spike="skip",
)


def settled(mean: float = 2.0, **changes) -> SpikeGuard:
    """A guard after its warm-up, with a known running norm."""
    guard = SpikeGuard(replace(CONFIG, **changes))
    guard.resume(Progress(images_seen=WARMUP_STEPS * BATCH, norm_mean=mean))
    return guard


@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spike_factor", [0.0, 5.0])
def test_what_is_not_finite_is_refused_from_the_first_step_on(norm, spike_factor):
    """Also with spikes switched off; the running norm forgets such a step."""
    guard = SpikeGuard(replace(CONFIG, spike_factor=spike_factor))
    assert not guard(norm)
    assert f"{norm} at {BATCH} images" in guard.reason
    assert guard.norm_mean == 0
    assert guard(1.0)
    assert guard.reason == ""


def test_threshold_is_a_factor_of_the_running_norm():
    """Just below the factor is accepted, just above is refused, and says by how much."""
    assert settled(2.0)(9.99)
    guard = settled(2.0)
    assert not guard(10.01)
    assert guard.reason == (
        "the gradient norm is 10.01 at 336 images, more than 5 times the usual 2"
    )
    assert guard.norm_mean == 2.0


def test_spikes_are_off_at_factor_zero():
    """Then a finite norm of any size is accepted."""
    assert settled(2.0, spike_factor=0.0)(1e30)


def test_nothing_is_a_spike_during_the_warm_up():
    """The first steps may be as steep as they like; the step after them may not."""
    guard = SpikeGuard(CONFIG)
    for step in range(WARMUP_STEPS):
        assert guard(1000.0 if step == 7 else 1.0), step
    assert not guard(1000.0)


def test_running_norm_is_the_geometric_mean_then_an_exponential_one():
    """At first the plain geometric mean; later every step weighs 1 / HORIZON_STEPS."""
    guard = SpikeGuard(CONFIG)
    norms = [1.0, 2.0, 4.0, 0.5, 3.0]
    for norm in norms:
        guard(norm)
    assert guard.norm_mean == pytest.approx(math.prod(norms) ** (1 / len(norms)))
    late = SpikeGuard(CONFIG)
    late.resume(Progress(images_seen=10 * HORIZON_STEPS * BATCH, norm_mean=2.0))
    late(4.0)
    assert late.norm_mean == pytest.approx(2.0 * 2.0 ** (1 / HORIZON_STEPS))


def test_a_norm_of_zero_passes_and_leaves_no_trace():
    """DeepSpeed takes a trial step with zero gradients when it is made."""
    guard = SpikeGuard(CONFIG)
    assert guard(0.0)
    guard(math.nan)
    assert f"at {BATCH} images" in guard.reason


def test_resumed_guard_decides_as_the_undisturbed_one():
    """Two numbers of a checkpoint suffice: images seen and the running norm; bit for bit."""
    norms = [1.0 + 0.3 * math.sin(i) for i in range(60)]
    norms[10] = norms[30] = norms[50] = 8.0
    norms[45] = math.nan
    whole = SpikeGuard(CONFIG)
    expected = [(whole(norm), whole.norm_mean, whole.reason) for norm in norms]
    for start in (1, 5, 20, 31, 46):
        resumed = SpikeGuard(CONFIG)
        resumed.resume(Progress(images_seen=start * BATCH, norm_mean=expected[start - 1][1]))
        found = [(resumed(norm), resumed.norm_mean, resumed.reason) for norm in norms[start:]]
        assert found == expected[start:]
    assert [i for i, (taken, *_) in enumerate(expected) if not taken] == [30, 45, 50]


def refuse(policy: str, **progress):
    """React to a spike under a policy."""
    guard = settled(on_spike=policy)
    assert not guard(100.0)
    return guard.react(Progress(num_spikes=1, **progress))


def test_policy_skip_loses_the_batch_alone():
    """Neither the rate nor the weights change."""
    reaction = refuse("skip", lr_factor=0.5)
    assert (reaction.rolls_back, reaction.lr_factor) == (False, 0.5)
    assert reaction.message == (
        "the gradient norm is 100 at 336 images, more than 5 times the usual 2: "
        "the batch is skipped (1 of at most 10 times)"
    )


def test_policy_rollback_goes_back():
    """The weights return to the last checkpoint, and people are told."""
    reaction = refuse("rollback")
    assert (reaction.rolls_back, reaction.lr_factor) == (True, 1.0)
    assert "goes back to the last checkpoint" in reaction.message


def test_policy_lower_rate_halves_the_rate_each_time():
    """The factor is the product over all spikes so far."""
    reaction = refuse("lower_rate", lr_factor=0.5)
    assert (reaction.rolls_back, reaction.lr_factor) == (False, 0.25)
    assert "the learning rate is 0.25 of the planned one" in reaction.message


def test_policy_stop_ends_training_with_advice():
    """The message says where, why and what to change."""
    with pytest.raises(TrainingDiverged, match=r"at 336 images.*train\.lr.*train\.on_spike"):
        refuse("stop")


@pytest.mark.parametrize("policy", ["skip", "rollback", "lower_rate"])
def test_too_many_spikes_end_training_whatever_the_policy(policy):
    """The last one allowed is still reacted to."""
    guard = settled(on_spike=policy, max_spikes=3)
    guard(math.nan)
    assert "3 of at most 3" in guard.react(Progress(num_spikes=3)).message
    with pytest.raises(TrainingDiverged, match=r"max_spikes allows 3 .* number 4"):
        guard.react(Progress(num_spikes=4))
