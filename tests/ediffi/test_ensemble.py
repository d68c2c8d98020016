"""Tests of ediffi.ensemble: routing by sigma, and the directory it is shipped in."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ediffi.conditioning import Conditioning, Stream, StreamConfig
from ediffi.ensemble import (
    Ensemble,
    load_base,
    load_ensemble,
    read_ensemble_info,
    save_ensemble,
)
from ediffi.guidance import guided
from ediffi.noise import WHOLE, NoiseInterval, SigmaDistribution, paper_intervals
from ediffi.preconditioning import Denoiser, Preconditioning
from ediffi.samplers import SAMPLERS, initial_noise
from ediffi.schedule import sigma_schedule
from ediffi.snapshot import Snapshot, SnapshotError, load_snapshot, save_snapshot
from ediffi.unet import UNet, UNetConfig

PAPER = SigmaDistribution()
INTERVALS = paper_intervals(PAPER)
CONFIG = UNetConfig(
    image_px=8,
    widths=(8, 8),
    num_blocks=1,
    cross_attention_px=(4,),
    head_width=8,
    context_width=8,
    embedding_width=16,
    streams=(StreamConfig(name="t5", token_width=6),),
)
ENCODERS = {"t5": {"family": "transformers", "weights_identity": {"sha256": "ab"}}}


class Constant(nn.Module):
    """A stand-in for an expert that answers its own number plus each sample's conditioning."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        assert len(x_BCHW) == len(sigma_B) == conditioning.batch_size
        pooled_BD = conditioning.streams["label"].pooled_BD
        assert pooled_BD is not None
        return torch.zeros_like(x_BCHW) + self.value + pooled_BD[:, :, None, None]


def constants() -> Ensemble:
    """Experts that answer 100, 200 and 300 from low to high noise."""
    values = {"high": 300.0, "low": 100.0, "middle": 200.0}
    return Ensemble({name: (INTERVALS[name], Constant(value)) for name, value in values.items()})


def answers(ensemble: Ensemble, sigmas: list[float]) -> list[float]:
    """What the ensemble answers for samples labelled 0, 1, 2, ... at these noise levels."""
    labels = torch.arange(float(len(sigmas)))[:, None]
    conditioning = Conditioning({"label": Stream(pooled_BD=labels)}, len(sigmas))
    sigma_B = torch.tensor(sigmas, dtype=torch.float64)
    found = ensemble(torch.zeros(len(sigmas), 1, 1, 1), sigma_B, conditioning)
    return found.flatten().tolist()


def random_denoiser(seed: int) -> Denoiser:
    """A small network with weights drawn afresh, since a new one answers zero."""
    network, generator = UNet(CONFIG), torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return Denoiser(network, Preconditioning()).eval()


def text(batch_size: int) -> Conditioning:
    """Random tokens for the networks of this file."""
    tokens_BTD = torch.randn(batch_size, 5, 6, generator=torch.Generator().manual_seed(2))
    mask_BT = torch.ones(batch_size, 5, dtype=torch.bool)
    return Conditioning({"t5": Stream(tokens_BTD=tokens_BTD, mask_BT=mask_BT)}, batch_size)


def test_each_sample_goes_to_the_expert_of_its_sigma_with_its_own_conditioning():
    """A mixed batch is split and put together again in order."""
    found = answers(constants(), [80.0, 0.01, 1.0, 9.0, 0.07, 10.0])
    assert found == [300.0, 101.0, 202.0, 203.0, 104.0, 305.0]


def test_intervals_are_half_open_at_the_edges():
    """An edge belongs to the expert above it, the value just below to the one below."""
    low_edge, high_edge = INTERVALS["low"].sigma_max, INTERVALS["high"].sigma_min
    for edge, below, above in ((low_edge, 100.0, 200.0), (high_edge, 200.0, 300.0)):
        assert answers(constants(), [edge]) == [above]
        assert answers(constants(), [math.nextafter(edge, 0.0)]) == [below]
        assert answers(constants(), [edge, math.nextafter(edge, 0.0)]) == [above, below + 1]


def test_float32_sigma_inside_an_interval_is_routed_to_its_expert():
    """Training noise levels of an expert, rounded to float32, never reach another one."""
    u_B = torch.cat([torch.tensor([0.0, 1.0]), torch.rand(200)]).double()
    for name, value in (("low", 100.0), ("middle", 200.0), ("high", 300.0)):
        sigmas = PAPER.sigma_at(u_B, INTERVALS[name]).tolist()
        assert answers(constants(), sigmas) == [value + label for label in range(len(sigmas))]


def test_calls_count_network_calls_per_expert():
    """A uniform batch is one call; a mixed one is a call for each expert concerned."""
    ensemble = constants()
    assert ensemble.names == ("low", "middle", "high")
    answers(ensemble, [1.0, 2.0, 3.0])
    answers(ensemble, [1.0, 20.0, 30.0])
    assert dict(ensemble.calls) == {"middle": 2, "high": 1}
    ensemble.reset_calls()
    assert not ensemble.calls


def test_heun_routes_each_call_of_a_step_by_its_own_sigma():
    """25 Heun steps divide their 49 calls 17/22/10 between high, middle and low noise."""
    ensemble = constants()
    conditioning = Conditioning({"label": Stream(pooled_BD=torch.zeros(1, 1))}, 1)
    SAMPLERS["heun"](ensemble, torch.zeros(1, 1, 1, 1), sigma_schedule(25), conditioning)
    assert dict(ensemble.calls) == {"high": 17, "middle": 22, "low": 10}


def test_guidance_costs_an_ensemble_one_call():
    """The conditional and the null branch share sigma, hence expert and call."""
    ensemble = constants()
    conditioning = Conditioning({"label": Stream(pooled_BD=torch.ones(2, 1))}, 2)
    found = guided(ensemble, 3.0)(torch.zeros(2, 1, 1, 1), torch.ones(2), conditioning)
    assert found.flatten().tolist() == [203.0, 203.0]
    assert dict(ensemble.calls) == {"middle": 1}


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan])
def test_noise_levels_that_no_expert_owns_are_refused(sigma):
    """Zero, negative and NaN noise levels are errors and not the nearest expert's."""
    with pytest.raises(ValueError, match="positive"):
        answers(constants(), [1.0, sigma])


def test_experts_must_tile_the_axis():
    """An ensemble with a gap cannot be built."""
    with pytest.raises(ValueError, match="gap"):
        Ensemble(
            {"a": (NoiseInterval(0.0, 1.0), Constant(1)), "b": (NoiseInterval(2.0), Constant(2))}
        )


def test_any_name_is_allowed_in_memory():
    """Names that are attributes of torch containers do not clash."""
    ensemble = Ensemble({"pop": (WHOLE, Constant(7.0))})
    assert answers(ensemble, [1.0, 50.0]) == [7.0, 8.0]


def test_experts_with_equal_weights_equal_the_base_bit_for_bit():
    """Sampling through three copies of the base gives the base's own pictures."""
    base = random_denoiser(0)
    ensemble = Ensemble({name: (interval, base) for name, interval in INTERVALS.items()})
    noise, conditioning = initial_noise([0, 1, 2], (3, 8, 8), 80.0), text(3)
    for sampler in SAMPLERS.values():
        expected = sampler(guided(base, 2.0), noise, sigma_schedule(8), conditioning)
        found = sampler(guided(ensemble, 2.0), noise, sigma_schedule(8), conditioning)
        assert torch.equal(found, expected)
    assert set(ensemble.calls) == {"low", "middle", "high"}


def test_a_mixed_batch_equals_its_samples_one_by_one():
    """Splitting a batch leaves every sample as if it had been sent to its expert alone."""
    denoisers = {name: random_denoiser(seed) for seed, name in enumerate(INTERVALS)}
    ensemble = Ensemble({name: (INTERVALS[name], d) for name, d in denoisers.items()})
    x_BCHW, conditioning = torch.randn(4, 3, 8, 8), text(4)
    sigma_B, names = torch.tensor([0.5, 20.0, 0.01, 5.0]), ["middle", "high", "low", "middle"]
    with torch.no_grad():
        found = ensemble(x_BCHW, sigma_B, conditioning)
        for b, name in enumerate(names):
            one = slice(b, b + 1)
            expected = denoisers[name](
                x_BCHW[one], sigma_B[one], conditioning.select(torch.tensor([b]))
            )
            torch.testing.assert_close(found[one], expected, rtol=1e-5, atol=1e-5)
    assert dict(ensemble.calls) == {"low": 1, "middle": 1, "high": 1}


def test_gradients_reach_every_expert_of_a_mixed_batch():
    """The split is differentiable."""
    experts = {name: (INTERVALS[name], random_denoiser(0)) for name in INTERVALS}
    ensemble = Ensemble(experts)
    ensemble(torch.randn(3, 3, 8, 8), torch.tensor([0.01, 1.0, 20.0]), text(3)).sum().backward()
    for _, denoiser in experts.values():
        assert any((p.grad is not None and p.grad.any()) for p in denoiser.parameters())


def snapshots(root: Path) -> dict[str, Path]:
    """Write a base and three experts, each with weights of its own."""
    intervals = {"base": WHOLE, **INTERVALS}
    for seed, (name, interval) in enumerate(intervals.items()):
        snapshot = Snapshot(
            network=CONFIG,
            preconditioning=Preconditioning(),
            distribution=PAPER,
            interval=interval,
            images_seen=1000 + seed,
        )
        save_snapshot(root / name, snapshot, random_denoiser(seed).network.state_dict())
    return {name: root / name for name in intervals}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Snapshot directories of base, low, middle and high."""
    return snapshots(tmp_path_factory.mktemp("snapshots"))


@pytest.fixture
def directory(tmp_path, sources) -> Path:
    """An assembled ensemble with its base."""
    experts = {name: sources[name] for name in ("high", "low", "middle")}
    save_ensemble(tmp_path / "ensemble", experts, base=sources["base"], encoders=ENCODERS)
    return tmp_path / "ensemble"


def test_ensemble_directory_gives_back_info_experts_and_base(directory, sources):
    """Everything needed comes back from the one directory, equal to the snapshots."""
    info, ensemble = load_ensemble(directory)
    assert [expert.name for expert in info.experts] == ["low", "middle", "high"]
    assert {expert.name: expert.interval for expert in info.experts} == INTERVALS
    assert [expert.images_seen for expert in info.experts] == [1001, 1002, 1003]
    assert (info.network, info.distribution, info.encoders) == (CONFIG, PAPER, ENCODERS)
    assert not ensemble.training
    x_BCHW, conditioning = torch.randn(1, 3, 8, 8), text(1)
    for name, sigma in (("low", 0.01), ("middle", 1.0), ("high", 20.0)):
        inputs = x_BCHW, torch.tensor([sigma]), conditioning
        assert torch.equal(ensemble(*inputs), load_snapshot(sources[name])[1](*inputs))
    inputs = x_BCHW, torch.tensor([1.0]), conditioning
    assert torch.equal(load_base(directory)(*inputs), load_snapshot(sources["base"])[1](*inputs))


def test_record_has_the_published_form(directory):
    """`ensemble.json` is what other programs read: its keys are a promise."""
    record = json.loads((directory / "ensemble.json").read_text())
    assert list(record) == [
        "format",
        "experts",
        "network",
        "preconditioning",
        "distribution",
        "encoders",
        "base",
    ]
    high = record["experts"][-1]
    assert list(high) == ["name", "interval", "weights", "sha256", "images_seen"]
    assert high["interval"] == {"sigma_min": INTERVALS["high"].sigma_min, "sigma_max": "inf"}
    assert high["weights"] == "high.safetensors"
    assert sorted(path.name for path in directory.iterdir()) == [
        "base.safetensors",
        "ensemble.json",
        "high.safetensors",
        "low.safetensors",
        "middle.safetensors",
    ]


def test_assembling_again_gives_equal_bytes(directory, sources, tmp_path):
    """The directory is a function of its snapshots, not of the order in which they are named."""
    experts = {name: sources[name] for name in ("low", "middle", "high")}
    save_ensemble(tmp_path / "again", experts, base=sources["base"], encoders=ENCODERS)
    for path in directory.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_an_ensemble_without_base_says_so(tmp_path, sources):
    """The base is optional; asking for it then is an error with its remedy."""
    experts = {name: sources[name] for name in INTERVALS}
    save_ensemble(tmp_path, experts, base=None, encoders={})
    assert "base" not in json.loads((tmp_path / "ensemble.json").read_text())
    load_ensemble(tmp_path)
    with pytest.raises(SnapshotError, match="no base model"):
        load_base(tmp_path)


@pytest.mark.parametrize("name", ["base", "low", "middle", "high"])
def test_every_damaged_file_is_refused_by_name(directory, name):
    """One flipped bit in any weights file stops the load, and the message names the file."""
    path = directory / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SnapshotError, match=rf"{name}\.safetensors is damaged"):
        load_ensemble(directory)


def test_a_kill_while_assembling_leaves_no_complete_ensemble(directory, sources, monkeypatch):
    """The record goes first and comes last, so an interrupted assembly cannot be loaded."""

    def killed(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ediffi.ensemble.shutil.copyfile", killed)
    experts = {name: sources[name] for name in INTERVALS}
    with pytest.raises(KeyboardInterrupt):
        save_ensemble(directory, experts, base=None, encoders={})
    with pytest.raises(SnapshotError, match=r"ensemble\.json is missing"):
        load_ensemble(directory)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda record: record["experts"].pop(1), "gap"),
        (lambda record: record["experts"][0].pop("sha256"), "sha256"),
        (lambda record: record["experts"][0].update(weights="../low.safetensors"), "weights"),
        (lambda record: record["experts"][0].update(name="../low"), "name"),
        (
            lambda record: record["experts"][0].update(name="high", weights="high.safetensors"),
            "distinct",
        ),
        (lambda record: record.pop("distribution"), "distribution"),
        (lambda record: record.update(format=2), "format"),
    ],
)
def test_an_unfit_record_is_refused_by_name(directory, edit, message):
    """Missing fields, paths that leave the directory and gaps are errors that name the file."""
    path = directory / "ensemble.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))
    with pytest.raises(SnapshotError, match=message) as raised:
        read_ensemble_info(directory)
    assert str(path) in str(raised.value)


def test_assembly_refuses_experts_that_do_not_tile(tmp_path, sources):
    """A missing middle is found before anything is written."""
    experts = {name: sources[name] for name in ("low", "high")}
    with pytest.raises(ValueError, match=r"gap .* between 'low' .* and 'high'"):
        save_ensemble(tmp_path / "ensemble", experts, base=None, encoders={})
    with pytest.raises(ValueError, match="at least one expert"):
        save_ensemble(tmp_path / "ensemble", {}, base=sources["base"], encoders={})
    assert not (tmp_path / "ensemble").exists()


def test_assembly_refuses_experts_of_different_families(tmp_path, sources):
    """All experts share one network, preconditioning and distribution; the odd one is named."""
    snapshot, denoiser = load_snapshot(sources["high"])
    other = Snapshot(
        network=snapshot.network,
        preconditioning=Preconditioning(sigma_data=1.0),
        distribution=snapshot.distribution,
        interval=snapshot.interval,
        images_seen=snapshot.images_seen,
    )
    save_snapshot(tmp_path / "other", other, denoiser.network.state_dict())
    experts = {name: sources[name] for name in ("low", "middle")} | {"high": tmp_path / "other"}
    with pytest.raises(ValueError, match="'low' and 'high' must have the same preconditioning"):
        save_ensemble(tmp_path / "ensemble", experts, base=None, encoders={})


@pytest.mark.parametrize("name", ["base", "../high", "", "a/b", ".hidden"])
def test_assembly_refuses_names_that_cannot_name_a_file(tmp_path, sources, name):
    """Names of experts become file names; "base" is the ancestor's."""
    experts = {"low": sources["low"], "middle": sources["middle"], name: sources["high"]}
    with pytest.raises(ValueError, match="name"):
        save_ensemble(tmp_path / "ensemble", experts, base=None, encoders={})
    assert not (tmp_path / "ensemble").exists()


def test_assembly_refuses_a_damaged_snapshot(tmp_path, sources):
    """A snapshot whose weights are not its record's stops the assembly."""
    damaged = tmp_path / "high"
    damaged.mkdir()
    for path in sources["high"].iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    (damaged / "model.safetensors").write_bytes(b"other bytes")
    experts = {name: sources[name] for name in ("low", "middle")} | {"high": damaged}
    with pytest.raises(SnapshotError, match=r"high/model\.safetensors is damaged"):
        save_ensemble(tmp_path / "ensemble", experts, base=None, encoders={})
    assert not (tmp_path / "ensemble").exists()
