"""Tests of ediffi.snapshot: round trip, equal bytes, completeness and damage."""

import json
import math
from dataclasses import replace

import pytest
import torch

from ediffi.conditioning import Conditioning
from ediffi.efficient_unet import EfficientUNet, EfficientUNetConfig
from ediffi.noise import NoiseInterval, SigmaDistribution
from ediffi.preconditioning import Denoiser, Preconditioning
from ediffi.snapshot import Snapshot, SnapshotError, load_snapshot, read_snapshot, save_snapshot
from ediffi.unet import UNet, UNetConfig

SNAPSHOT = Snapshot(
    network=UNetConfig(image_px=8, widths=(8, 8), num_blocks=1, embedding_width=16),
    preconditioning=Preconditioning(sigma_data=0.4),
    distribution=SigmaDistribution(log_mean=-0.3, log_std=1.3),
    interval=NoiseInterval(9.610123456789, math.inf),
    images_seen=12_345,
)


def random_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights drawn afresh, since a new network answers zero."""
    generator = torch.Generator().manual_seed(seed)
    state = UNet(SNAPSHOT.network).state_dict()
    return {name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in state.items()}


def test_snapshot_gives_back_record_and_denoiser(tmp_path):
    """What is loaded equals what was saved, bit for bit, in eval mode."""
    state = random_state()
    save_snapshot(tmp_path / "new" / "snapshot", SNAPSHOT, state)
    snapshot, denoiser = load_snapshot(tmp_path / "new" / "snapshot")
    assert snapshot == SNAPSHOT
    assert not denoiser.training
    network = UNet(SNAPSHOT.network)
    network.load_state_dict(state)
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 9.0]), Conditioning({}, 2)
    expected = Denoiser(network, SNAPSHOT.preconditioning).eval()(*inputs)
    assert torch.equal(denoiser(*inputs), expected)


def test_a_super_resolution_snapshot_comes_back_as_what_it_was(tmp_path):
    """The record names the family, so that the right network is built."""
    config = EfficientUNetConfig(image_px=8, widths=(8,), num_blocks=(1,), low_res_factor=2)
    snapshot = replace(SNAPSHOT, network=config)
    network = EfficientUNet(config)
    save_snapshot(tmp_path, snapshot, network.state_dict())
    loaded, denoiser = load_snapshot(tmp_path)
    assert loaded == snapshot
    assert isinstance(denoiser.network, EfficientUNet)
    state = denoiser.network.state_dict()
    assert all(torch.equal(state[name], t) for name, t in network.state_dict().items())


def test_a_snapshot_from_before_there_were_families_can_be_read(tmp_path):
    """Without a family, the network is the base's U-Net."""
    save_snapshot(tmp_path, SNAPSHOT, random_state())
    path = tmp_path / "snapshot.json"
    record = json.loads(path.read_text())
    assert record["network"].pop("family") == "adm"
    path.write_text(json.dumps(record))
    snapshot, denoiser = load_snapshot(tmp_path)
    assert snapshot == SNAPSHOT
    assert isinstance(denoiser.network, UNet)


def test_equal_snapshots_are_equal_bytes(tmp_path):
    """Bytes do not depend on the order of the state dict, the directory or the time."""
    state = random_state()
    save_snapshot(tmp_path / "a", SNAPSHOT, state)
    save_snapshot(tmp_path / "b", SNAPSHOT, dict(reversed(state.items())))
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["model.safetensors", "snapshot.json"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_saving_over_a_snapshot_replaces_it(tmp_path):
    """The later snapshot is what is found."""
    save_snapshot(tmp_path, SNAPSHOT, random_state(0))
    _, before = read_snapshot(tmp_path)
    save_snapshot(tmp_path, SNAPSHOT, random_state(1))
    _, after = read_snapshot(tmp_path)
    assert before != after
    load_snapshot(tmp_path)


def test_a_kill_while_saving_leaves_no_complete_snapshot(tmp_path, monkeypatch):
    """Killed before the record, an overwritten snapshot is incomplete and not a mixture."""
    save_snapshot(tmp_path, SNAPSHOT, random_state(0))

    def killed(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ediffi.snapshot.publish_json", killed)
    with pytest.raises(KeyboardInterrupt):
        save_snapshot(tmp_path, SNAPSHOT, random_state(1))
    with pytest.raises(SnapshotError, match=r"snapshot\.json is missing"):
        load_snapshot(tmp_path)


def test_damaged_weights_are_refused_by_name(tmp_path):
    """One flipped bit anywhere in the weights is found, and the message names the file."""
    save_snapshot(tmp_path, SNAPSHOT, random_state())
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SnapshotError, match=r"model\.safetensors is damaged.*sha256"):
        load_snapshot(tmp_path)
    path.unlink()
    with pytest.raises(SnapshotError, match=r"model\.safetensors is missing"):
        load_snapshot(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda record: record.pop("network"), "field 'network' is missing"),
        (lambda record: record.pop("sha256"), "field 'sha256' is missing"),
        (lambda record: record.update(format=99), "required format 1, found 99"),
        (lambda record: record.update(images_seen=-1), "images_seen"),
        (lambda record: record["interval"].update(sigma_max=1.0), "sigma_min < sigma_max"),
        (lambda record: record["network"].update(depth=3), "depth"),
        (lambda record: record["preconditioning"].update(sigma_data="x"), "sigma_data|must be"),
    ],
)
def test_an_unfit_record_is_refused_by_name(tmp_path, edit, message):
    """Every error of the record names its file and its field."""
    save_snapshot(tmp_path, SNAPSHOT, random_state())
    path = tmp_path / "snapshot.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))
    with pytest.raises(SnapshotError, match=message) as raised:
        load_snapshot(tmp_path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_record_that_is_no_json_object_is_refused(tmp_path, text):
    """Torn or foreign JSON gives the same kind of error."""
    (tmp_path / "snapshot.json").write_text(text)
    with pytest.raises(SnapshotError, match=r"snapshot\.json"):
        load_snapshot(tmp_path)


def test_state_of_another_network_is_refused_before_anything_is_written(tmp_path):
    """Saving checks names and shapes, so that a later load cannot fail on them."""
    state = random_state()
    prefixed = {f"network.{name}": tensor for name, tensor in state.items()}
    first = next(iter(state))
    for wrong in (prefixed, {**state, first: torch.zeros(1)}, {}):
        with pytest.raises(ValueError, match="does not fit the network config") as raised:
            save_snapshot(tmp_path / "snapshot", SNAPSHOT, wrong)
        assert first in str(raised.value) or "more" in str(raised.value)
    assert not (tmp_path / "snapshot").exists()


def test_loading_leaves_global_random_state_alone(tmp_path):
    """Building the network draws no numbers from the caller's generator."""
    save_snapshot(tmp_path, SNAPSHOT, random_state())
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_snapshot(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_loaded_weights_can_be_trained_and_are_the_loader_s_own(tmp_path):
    """They see gradients, and writing over the file afterwards does not reach them."""
    state = random_state()
    save_snapshot(tmp_path, SNAPSHOT, state)
    _, denoiser = load_snapshot(tmp_path)
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(-4096, 2)
        file.write(bytes(4096))
    loaded = denoiser.network.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    denoiser(torch.randn(1, 3, 8, 8), torch.tensor([1.0]), Conditioning({}, 1)).sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in denoiser.parameters())
