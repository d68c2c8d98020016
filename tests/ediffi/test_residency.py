"""Tests of ediffi.residency: pictures do not depend on where weights wait; memory does."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ediffi.ensemble import Ensemble
from ediffi.ensemble_file import load_ensemble
from ediffi.preconditioning import Denoiser
from ediffi.residency import OnDemand, Residency, Residents
from ediffi.sampling import SamplingConfig, draw
from ediffi.snapshot import SnapshotError
from tests.tiny_ensemble import random_denoiser, text, write_ensemble

NAMES = ("low", "middle", "high")
EXPERT_BYTES = sum(4 * p.numel() for p in random_denoiser(0).parameters())
EXPERT_GIB = EXPERT_BYTES / 2**30
SIGMAS = {"low": 0.01, "middle": 1.0, "high": 20.0}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """An ensemble of three experts and their base."""
    return write_ensemble(tmp_path_factory.mktemp("residency") / "ensemble")


def drawn(ensemble: Ensemble, device: str = "cpu") -> Tensor:
    """Two pictures through all three experts."""
    config = SamplingConfig(num_steps=5)
    pictures = draw(
        ensemble, text(2), seeds=[0, 1], shape_CHW=(3, 8, 8), config=config, device=device
    )
    assert set(ensemble.calls) == set(NAMES)
    return pictures


def ask(ensemble: Ensemble, *names: str) -> None:
    """One call to each of the named experts, in that order."""
    for name in names:
        ensemble(torch.zeros(1, 3, 8, 8), torch.tensor([SIGMAS[name]]), text(1))


def residents_of(ensemble: Ensemble) -> Residents:
    """What an ensemble's experts share."""
    (first, *_) = ensemble._denoisers
    assert isinstance(first, OnDemand)
    return first._residents


@pytest.mark.parametrize("load", ["eager", "lazy"])
@pytest.mark.parametrize("num_experts", [0, 1, 2, 3])
def test_pictures_are_the_same_bits_wherever_weights_wait(directory, load, num_experts):
    """Lazily loaded, dropped and read again: the same pictures as with all in memory."""
    residency = Residency(load=load, device_gib=1.001 * num_experts * EXPERT_GIB, offload="disk")
    expected = drawn(load_ensemble(directory)[1])
    assert torch.equal(drawn(load_ensemble(directory, residency=residency)[1]), expected)


def test_the_global_random_state_is_left_alone_by_lazy_loading(directory):
    """Reading in the middle of a draw must not change what others draw."""
    _, ensemble = load_ensemble(directory, residency=Residency(load="lazy"))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    ask(ensemble, *NAMES)
    assert torch.equal(torch.rand(3), expected)


def test_a_lazy_load_reads_an_expert_when_it_is_first_called(directory):
    """Nothing is there before; then those who were called, and they stay."""
    _, ensemble = load_ensemble(directory, residency=Residency(load="lazy"))
    assert residents_of(ensemble).names == ()
    ask(ensemble, "high", "middle", "high")
    assert residents_of(ensemble).names == ("middle", "high")
    assert list(ensemble.parameters()) == []


def test_the_least_recently_used_expert_leaves_first(directory):
    """With room for two, a third sends away the one that has rested longest."""
    residency = Residency(load="lazy", device_gib=2.5 * EXPERT_GIB, offload="disk")
    _, ensemble = load_ensemble(directory, residency=residency)
    ask(ensemble, "high", "middle", "high", "low")
    assert residents_of(ensemble).names == ("high", "low")
    ask(ensemble, "middle")
    assert residents_of(ensemble).names == ("low", "middle")


def test_a_budget_of_exactly_some_experts_holds_them(directory):
    """The budget is inclusive; a byte less holds one expert less."""
    for missing_bytes, capacity in ((0, 2), (1, 1)):
        gib = (2 * EXPERT_BYTES - missing_bytes) / 2**30
        residency = Residency(load="lazy", device_gib=gib, offload="disk")
        _, ensemble = load_ensemble(directory, residency=residency)
        assert residents_of(ensemble).capacity == capacity


def test_an_eager_load_under_a_budget_keeps_the_noisiest(directory):
    """Sampling starts there."""
    residency = Residency(device_gib=1.5 * EXPERT_GIB, offload="disk")
    _, ensemble = load_ensemble(directory, residency=residency)
    assert residents_of(ensemble).names == ("high",)


@pytest.mark.parametrize(
    ("residency", "refused_at"),
    [
        (Residency(), "load"),
        (Residency(device_gib=1.5 * EXPERT_GIB, offload="disk"), "load"),
        (Residency(load="lazy"), "call"),
    ],
)
def test_a_damaged_file_is_found_whenever_it_is_read(tmp_path, residency, refused_at):
    """Eager loads find it at once, lazy ones when the expert is called; both name it."""
    directory = write_ensemble(tmp_path / "ensemble")
    path = directory / "low.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    if refused_at == "load":
        with pytest.raises(SnapshotError, match=r"low\.safetensors is damaged"):
            load_ensemble(directory, residency=residency)
        return
    _, ensemble = load_ensemble(directory, residency=residency)
    ask(ensemble, "high", "middle")
    with pytest.raises(SnapshotError, match=r"low\.safetensors is damaged"):
        ask(ensemble, "low")
    ask(ensemble, "middle")


def test_a_file_that_was_replaced_between_two_readings_is_refused(tmp_path):
    """What was dropped is checked again when it comes back."""
    directory = write_ensemble(tmp_path / "ensemble")
    residency = Residency(load="lazy", device_gib=1.5 * EXPERT_GIB, offload="disk")
    _, ensemble = load_ensemble(directory, residency=residency)
    ask(ensemble, "low", "high")
    (directory / "low.safetensors").write_bytes((directory / "high.safetensors").read_bytes())
    with pytest.raises(SnapshotError, match=r"low\.safetensors is damaged or was replaced"):
        ask(ensemble, "low")


def test_stand_ins_share_one_set_of_weights(tmp_path):
    """Two absent experts cost the budget one base."""
    directory = write_ensemble(tmp_path / "ensemble")
    for name in ("low", "high"):
        (directory / f"{name}.safetensors").unlink()
    with pytest.warns(UserWarning, match="stands in"):
        _, ensemble = load_ensemble(directory, missing="base", residency=Residency(load="lazy"))
    ask(ensemble, "low", "high", "middle")
    assert residents_of(ensemble).names == ("base", "middle")


def test_loading_in_inference_mode_leaves_weights_that_can_be_used_outside(directory):
    """A first call inside inference mode must not spoil the weights for gradients later."""
    _, ensemble = load_ensemble(directory, residency=Residency(load="lazy"))
    with torch.inference_mode():
        ask(ensemble, "middle")
    x_BCHW = torch.randn(1, 3, 8, 8, requires_grad=True)
    ensemble(x_BCHW, torch.tensor([1.0]), text(1)).sum().backward()
    assert x_BCHW.grad is not None
    assert x_BCHW.grad.any()


# -- moving weights, on torch's device without memory ---------------------------------------------


def on_demand(residents: Residents, name: str, seed: int) -> tuple[OnDemand, list]:
    """A denoiser that is made, not read, and weak references to all that were made."""
    made: list[weakref.ref[Denoiser]] = []

    def read() -> Denoiser:
        denoiser = random_denoiser(seed)
        made.append(weakref.ref(denoiser))
        return denoiser

    return OnDemand(name, read, residents), made


def residents(offload: str) -> Residents:
    """Room for one denoiser, on `meta`: a device other than the CPU that every machine has."""
    residency = Residency(load="lazy", device_gib=1.5 * EXPERT_GIB, offload=offload)
    return Residents(device="meta", residency=residency, denoiser_bytes=EXPERT_BYTES)


def test_weights_off_the_device_wait_on_the_cpu_unchanged():
    """They are read once; leaving gives back the very same numbers, coming again moves them."""
    room = residents("cpu")
    first, made = on_demand(room, "first", 0)
    second, _ = on_demand(room, "second", 1)
    assert {p.device.type for p in first.bring().parameters()} == {"meta"}
    second.bring()
    assert room.names == ("second",)
    (only,) = made
    denoiser = only()
    assert denoiser is not None
    for found, expected in zip(denoiser.parameters(), random_denoiser(0).parameters(), strict=True):
        assert torch.equal(found, expected)
    assert {p.device.type for p in first.bring().parameters()} == {"meta"}
    assert (len(made), room.names) == (1, ("first",))


def test_weights_dropped_to_disk_leave_no_copy_in_memory():
    """After leaving nothing holds the denoiser; coming again reads it once more."""
    room = residents("disk")
    first, made = on_demand(room, "first", 0)
    second, _ = on_demand(room, "second", 1)
    first.bring()
    second.bring()
    gc.collect()
    assert made[0]() is None
    first.bring()
    assert len(made) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_a_budget_holds_on_a_real_device(directory, offload):
    """Pictures are those of an unlimited device, and memory stays under the budget."""
    expected = drawn(load_ensemble(directory, device="cuda")[1], "cuda")
    gc.collect()
    before = torch.cuda.memory_allocated()
    residency = Residency(device_gib=1.5 * EXPERT_GIB, offload=offload)
    _, ensemble = load_ensemble(directory, device="cuda", residency=residency)
    assert torch.equal(drawn(ensemble, "cuda"), expected)
    gc.collect()
    # The allocator rounds every tensor up to 512 bytes.
    num_tensors = len(list(random_denoiser(0).parameters()))
    held = torch.cuda.memory_allocated() - before - expected.nbytes
    assert held <= EXPERT_BYTES + 512 * num_tensors


# -- refusals -------------------------------------------------------------------------------------


def test_a_budget_below_one_expert_is_refused(directory):
    """The message says how much one needs."""
    residency = Residency(device_gib=0.9 * EXPERT_GIB, offload="disk")
    with pytest.raises(ValueError, match=r"device_gib must hold the weights of one expert, .* GiB"):
        load_ensemble(directory, residency=residency)


def test_offloading_from_the_cpu_to_the_cpu_is_refused(directory):
    """It would free nothing and say nothing."""
    with pytest.raises(ValueError, match="offload must be 'disk'"):
        load_ensemble(directory, residency=Residency(device_gib=2 * EXPERT_GIB))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"load": "later"}, "load must be one of eager, lazy, got 'later'"),
        ({"offload": "tape"}, "offload must be one of cpu, disk, got 'tape'"),
        ({"device_gib": -1.0}, "device_gib must be finite and not negative"),
        ({"device_gib": float("inf")}, "0 is no limit"),
    ],
)
def test_a_residency_that_makes_no_sense_is_refused(fields, message):
    """The message names the field and lists the choices."""
    with pytest.raises(ValueError, match=message):
        Residency(**fields)
