"""Tests of ediffi.ensemble_file: the directory that an ensemble is shipped in."""

import json
from pathlib import Path

import pytest
import torch

from ediffi.ensemble_file import (
    load_base,
    load_ensemble,
    read_ensemble_info,
    save_ensemble,
)
from ediffi.noise import WHOLE
from ediffi.preconditioning import Preconditioning
from ediffi.residency import Residency
from ediffi.snapshot import Snapshot, SnapshotError, load_snapshot, save_snapshot
from tests.tiny_ensemble import (
    ENCODERS,
    INTERVALS,
    PAPER,
    base_config,
    text,
    write_snapshots,
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Snapshot directories of base, low, middle and high."""
    return write_snapshots(tmp_path_factory.mktemp("snapshots"), {"base": WHOLE, **INTERVALS})


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
    assert (info.network, info.distribution, info.encoders) == (base_config(), PAPER, ENCODERS)
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

    monkeypatch.setattr("ediffi.ensemble_file.shutil.copyfile", killed)
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


# -- the base stands in ---------------------------------------------------------------------------


@pytest.mark.parametrize("load", ["eager", "lazy"])
def test_the_base_stands_in_for_absent_experts_aloud(directory, sources, load):
    """By setting: a warning names them, and where they would answer, the base does."""
    for name in ("high", "low"):
        (directory / f"{name}.safetensors").unlink()
    with pytest.warns(UserWarning, match="no weights of low, high; the base stands in"):
        _, ensemble = load_ensemble(directory, missing="base", residency=Residency(load=load))
    assert ensemble.names == ("low", "middle", "high")
    assert ensemble.stand_ins == ("low", "high")
    x_BCHW, conditioning = torch.randn(1, 3, 8, 8), text(1)
    for source, sigma in (("base", 0.01), ("middle", 1.0), ("base", 20.0)):
        inputs = x_BCHW, torch.tensor([sigma]), conditioning
        assert torch.equal(ensemble(*inputs), load_snapshot(sources[source])[1](*inputs))


def test_nobody_stands_in_unasked(directory):
    """An absent expert is an error by default, even if the base is there."""
    (directory / "high.safetensors").unlink()
    with pytest.raises(SnapshotError, match=r"high\.safetensors is missing"):
        load_ensemble(directory)


def test_a_complete_ensemble_needs_no_stand_in(directory, recwarn):
    """Asking for one where nothing is missing changes nothing and says nothing."""
    _, ensemble = load_ensemble(directory, missing="base")
    assert ensemble.stand_ins == ()
    assert [str(w.message) for w in recwarn if "stands in" in str(w.message)] == []


@pytest.mark.parametrize("name", ["base", "low"])
def test_a_damaged_file_is_an_error_even_if_the_base_may_stand_in(directory, name):
    """Only absence is made good; the base too must be what its record says."""
    (directory / "high.safetensors").unlink()
    (directory / f"{name}.safetensors").write_bytes(b"other bytes")
    with pytest.raises(SnapshotError, match=rf"{name}\.safetensors is damaged"):
        load_ensemble(directory, missing="base")


def test_without_a_base_nobody_can_stand_in(tmp_path, sources):
    """The message names the absent expert and the remedy."""
    experts = {name: sources[name] for name in INTERVALS}
    save_ensemble(tmp_path, experts, base=None, encoders={})
    (tmp_path / "high.safetensors").unlink()
    with pytest.raises(SnapshotError, match="no weights of high and no base model"):
        load_ensemble(tmp_path, missing="base")


def test_an_unknown_answer_to_missing_experts_is_refused(directory):
    """The message lists the choices."""
    with pytest.raises(ValueError, match="missing must be one of error, base, got 'skip'"):
        load_ensemble(directory, missing="skip")
