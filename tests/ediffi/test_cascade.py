"""Tests of ediffi.cascade: the directory, what fits what, and enlarging twice from noise."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ediffi.cascade import (
    PAPER_ENLARGING,
    enlarge,
    picture_sizes_px,
    read_cascade,
    save_cascade,
)
from ediffi.conditioning import Conditioning, StreamConfig
from ediffi.ensemble_file import load_ensemble, save_ensemble
from ediffi.network import NetworkConfig
from ediffi.noise import NoiseInterval
from ediffi.residency import Load, Residency
from ediffi.sampling import SamplingConfig, draw
from ediffi.snapshot import SnapshotError
from tests.tiny_ensemble import (
    ENCODERS,
    PAPER,
    STREAMS,
    base_config,
    enlarging_config,
    random_denoiser,
    text,
    write_ensemble,
    write_snapshots,
)

SR16, SR32 = enlarging_config(16), enlarging_config(32)
FAST = SamplingConfig(num_steps=3)


def write_enlarger(directory: Path, config: NetworkConfig, encoders: dict | None = None) -> Path:
    """An ensemble of two experts, split at the median as the paper's SR256 is."""
    median = PAPER.quantile(0.5)
    halves = {"low": NoiseInterval(0.0, median), "high": NoiseInterval(median)}
    snapshots = write_snapshots(directory.with_name(directory.name + "-s"), halves, config)
    save_ensemble(directory, snapshots, base=None, encoders=encoders or {})
    return directory


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Path]:
    """A base of 8 px and two ensembles that double, each in a directory of its own."""
    root = tmp_path_factory.mktemp("parts")
    return {
        "base": write_ensemble(root / "base"),
        "sr16": write_enlarger(root / "sr16", SR16, ENCODERS),
        "sr32": write_enlarger(root / "sr32", SR32),
    }


@pytest.fixture
def directory(tmp_path, parts) -> Path:
    """A cascade 8, 16, 32 px."""
    shutil.copytree(parts["base"], tmp_path / "ensemble")
    save_cascade(tmp_path / "ensemble", {name: parts[name] for name in ("sr16", "sr32")})
    return tmp_path / "ensemble"


def record_of(directory: Path) -> dict:
    """What `cascade.json` says."""
    return json.loads((directory / "cascade.json").read_text())


# -- the directory --------------------------------------------------------------------------------


def test_a_cascade_comes_back_in_order_of_size(directory):
    """Its ensembles lie inside the base's directory, and each can be loaded on its own."""
    paths = read_cascade(directory)
    assert paths == (directory / "super_resolution/sr16", directory / "super_resolution/sr32")
    assert [load_ensemble(path)[0].network for path in paths] == [SR16, SR32]
    assert load_ensemble(directory)[0].network == base_config()


def test_the_record_has_the_published_form(directory):
    """Other programs read it: its keys are a promise; paths are relative, with slashes."""
    assert record_of(directory) == {
        "format": 1,
        "super_resolution": ["super_resolution/sr16", "super_resolution/sr32"],
    }


def test_a_cascade_can_be_moved(directory, tmp_path):
    """Everything is inside the one directory."""
    moved = directory.rename(tmp_path / "elsewhere")
    assert read_cascade(moved)[1] == moved / "super_resolution/sr32"
    load_ensemble(read_cascade(moved)[1])


def test_an_ensemble_without_a_cascade_has_none(parts):
    """That is no error: the base draws alone."""
    assert read_cascade(parts["base"]) == ()


def test_ensembles_already_in_place_are_recorded_and_not_copied(tmp_path, parts):
    """Who assembled them there need not have room for them twice."""
    directory = tmp_path / "ensemble"
    shutil.copytree(parts["base"], directory)
    inside = directory / "super_resolution/sr16"
    shutil.copytree(parts["sr16"], inside)
    before = {path: path.stat().st_ino for path in inside.iterdir()}
    save_cascade(directory, {"sr16": inside})
    assert read_cascade(directory) == (inside,)
    assert {path: path.stat().st_ino for path in inside.iterdir()} == before


def test_saving_again_replaces_the_cascade(directory, parts):
    """A shorter cascade over a longer one is the shorter one."""
    save_cascade(directory, {"sr16": parts["sr16"]})
    assert read_cascade(directory) == (directory / "super_resolution/sr16",)


def test_a_kill_while_saving_leaves_no_record(directory, parts, monkeypatch):
    """The record goes first and comes last."""

    def killed(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ediffi.cascade.shutil.copyfile", killed)
    with pytest.raises(KeyboardInterrupt):
        save_cascade(directory, {"sr16": parts["sr16"]})
    assert not (directory / "cascade.json").exists()
    assert not (directory / "super_resolution/sr16/ensemble.json").exists()


@pytest.mark.parametrize(
    "names",
    [
        [],
        "super_resolution/sr16",
        ["../elsewhere"],
        ["super_resolution/../../elsewhere"],
        ["/super_resolution/sr16"],
        ["."],
        [""],
        [7],
        ["super_resolution/link"],
        ["super_resolution/sr16", "super_resolution/sr16"],
    ],
)
def test_a_record_that_leads_elsewhere_is_refused(directory, parts, names):
    """Paths out of the directory, by name or by link, repeated ones and none at all."""
    (directory / "super_resolution/link").symlink_to(parts["sr16"])
    (directory / "cascade.json").write_text(json.dumps({"format": 1, "super_resolution": names}))
    with pytest.raises(SnapshotError, match=r"cascade\.json: super_resolution must"):
        read_cascade(directory)


def test_an_absent_ensemble_is_named(directory):
    """A record that promises what is not there is an error."""
    shutil.rmtree(directory / "super_resolution/sr32")
    with pytest.raises(SnapshotError, match=r"sr32/ensemble\.json is missing"):
        read_cascade(directory)


def test_a_record_in_the_wrong_order_is_refused_on_reading(directory):
    """What does not chain could only draw nonsense; the message names the record."""
    record = record_of(directory)
    record["super_resolution"].reverse()
    (directory / "cascade.json").write_text(json.dumps(record))
    with pytest.raises(SnapshotError, match=r"cascade\.json: .*sr32.* is given pictures of 8 px"):
        read_cascade(directory)


def test_another_format_is_refused(directory):
    """It comes from another version of the library."""
    (directory / "cascade.json").write_text(json.dumps({**record_of(directory), "format": 2}))
    with pytest.raises(SnapshotError, match="required format 1, found 2"):
        read_cascade(directory)


# -- what is refused before anything is written ---------------------------------------------------


def refused(tmp_path: Path, parts: dict[str, Path], ensembles: dict[str, Path], match: str) -> None:
    """Saving must fail and write nothing."""
    directory = tmp_path / "ensemble"
    shutil.copytree(parts["base"], directory)
    before = sorted(directory.rglob("*"))
    with pytest.raises(ValueError, match=match):
        save_cascade(directory, ensembles)
    assert sorted(directory.rglob("*")) == before


def test_saving_refuses_sizes_that_do_not_chain(tmp_path, parts):
    """8 to 32 px leaves 16 out."""
    refused(tmp_path, parts, {"sr32": parts["sr32"]}, "sr32 enlarges 16 px to 32 px .* of 8 px")


def test_saving_refuses_a_network_that_does_not_enlarge(tmp_path, parts):
    """A base cannot follow a base."""
    refused(tmp_path, parts, {"other": parts["base"]}, "other must be a super-resolution network")


def test_saving_refuses_an_empty_cascade(tmp_path, parts):
    """That would be the base alone, which needs no record."""
    refused(tmp_path, parts, {}, "at least one")


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden"])
def test_saving_refuses_names_that_cannot_name_a_directory(tmp_path, parts, name):
    """Names become directories inside the base's."""
    refused(tmp_path, parts, {name: parts["sr16"]}, "name")


@pytest.mark.parametrize(
    "stream", [StreamConfig(name="t5", token_width=7), StreamConfig(name="clip", token_width=6)]
)
def test_saving_refuses_streams_that_are_not_the_base_s(tmp_path, parts, stream):
    """One conditioning is made for the whole cascade: names and widths must agree."""
    other = write_enlarger(tmp_path / "other", replace(SR16, streams=(stream,)))
    refused(tmp_path, parts, {"other": other}, f"stream {stream.name} of other must be the base's")


def test_saving_refuses_other_encoders(tmp_path, parts):
    """Equal widths from another encoder would be nonsense unnoticed."""
    other = write_enlarger(tmp_path / "other", SR16, {"t5": {"family": "open_clip"}})
    refused(tmp_path, parts, {"other": other}, "encoder t5 of other must be the base's")


def test_saving_refuses_damaged_weights(tmp_path, parts):
    """A file that is not its record's is found before it is copied."""
    damaged = tmp_path / "damaged"
    shutil.copytree(parts["sr16"], damaged)
    (damaged / "high.safetensors").write_bytes(b"other bytes")
    refused(tmp_path, parts, {"sr16": damaged}, r"damaged/high\.safetensors is damaged")


def test_an_enlarger_may_do_without_some_streams(tmp_path, parts):
    """It takes what it needs of the base's conditioning."""
    streams = (*STREAMS, StreamConfig(name="clip", pooled_width=4))
    base = write_ensemble(tmp_path / "ensemble", replace(base_config(), streams=streams))
    save_cascade(base, {"sr16": parts["sr16"]})
    assert len(read_cascade(base)) == 1


# -- sizes ----------------------------------------------------------------------------------------


def test_sizes_of_the_paper_s_cascade():
    """64, 256, 1024 px, though the last network was trained on patches of 256 px."""
    base = replace(base_config(), image_px=64, cross_attention_px=(32,))
    enlarging = {
        "sr256": enlarging_config(256, low_res_factor=4, self_attention_px=(128,)),
        "sr1024": enlarging_config(256, low_res_factor=4),
    }
    assert picture_sizes_px(base, enlarging) == {"sr256": 256, "sr1024": 1024}


def test_self_attention_binds_a_network_to_its_size():
    """Without it a network enlarges any picture; with it, only what it was trained at."""
    patches = {"sr": enlarging_config(8)}
    assert picture_sizes_px(base_config(), patches) == {"sr": 16}
    with pytest.raises(ValueError, match="sr enlarges 4 px to 8 px"):
        picture_sizes_px(base_config(), {"sr": enlarging_config(8, self_attention_px=(4,))})


def test_sizes_must_be_multiples_of_the_network_s_stride():
    """Levels halve the picture: 48 px cannot be halved five times, though patches of 32 px can."""
    deep = enlarging_config(32, widths=(8,) * 5, num_blocks=(1,) * 5)
    base = replace(base_config(), image_px=24, cross_attention_px=(12,))
    assert picture_sizes_px(replace(base, image_px=32, cross_attention_px=(16,)), {"sr": deep})
    with pytest.raises(ValueError, match="in steps of 32 px, but is given pictures of 24 px"):
        picture_sizes_px(base, {"sr": deep})


def test_an_enlarger_draws_as_many_channels_as_the_base():
    """Grey pictures cannot be enlarged in colour."""
    with pytest.raises(ValueError, match="must draw 3 channels"):
        picture_sizes_px(base_config(), {"sr": enlarging_config(16, image_channels=1)})


# -- enlarging ------------------------------------------------------------------------------------


def draw_cascade(
    directory: Path, seeds: list[int], config: SamplingConfig, load: Load = "eager"
) -> list[Tensor]:
    """Pictures of every size, from the base to the largest."""
    conditioning = text(3).select(torch.tensor(seeds))
    residency = Residency(load=load)
    _, base = load_ensemble(directory, residency=residency)
    pictures = [draw(base, conditioning, seeds=seeds, shape_CHW=(3, 8, 8), config=config)]
    for stage, path in enumerate(read_cascade(directory), start=1):
        info, ensemble = load_ensemble(path, residency=residency)
        pictures.append(
            enlarge(
                ensemble,
                info.network,
                pictures[-1],
                conditioning,
                seeds=seeds,
                stage=stage,
                config=config,
            )
        )
        assert set(ensemble.calls) == {"low", "high"}
    return pictures


def test_a_cascade_draws_three_sizes_one_after_the_other(directory):
    """8, 16 and 32 px, finite, and each depends on the one before it."""
    pictures = draw_cascade(directory, [0, 1], FAST)
    assert [tuple(p.shape) for p in pictures] == [(2, 3, 8, 8), (2, 3, 16, 16), (2, 3, 32, 32)]
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in pictures)
    other = enlarge(
        load_ensemble(read_cascade(directory)[0])[1],
        SR16,
        -pictures[0],
        text(3).select(torch.tensor([0, 1])),
        seeds=[0, 1],
        stage=1,
        config=FAST,
    )
    assert not torch.allclose(other, pictures[1])


def test_a_cascade_s_pictures_do_not_depend_on_their_batch_or_residency(directory):
    """Picture 1 alone, lazily loaded, is picture 1 of three in two batches."""
    together = draw_cascade(directory, [0, 1, 2], replace(FAST, batch_pictures=2))
    alone = draw_cascade(directory, [1], FAST, "lazy")
    for one, many in zip(alone, together):
        torch.testing.assert_close(one[0], many[1], rtol=1e-4, atol=1e-4)


def test_enlarging_is_one_draw_at_the_larger_size():
    """Bit for bit: the small picture as the network's input, noise of its own stage."""
    denoiser, small = random_denoiser(3, SR16), torch.rand(2, 3, 8, 8) * 2 - 1
    found = enlarge(denoiser, SR16, small, text(2), seeds=[4, 5], stage=2, config=FAST)
    expected = draw(
        denoiser,
        replace(text(2), low_res_BCHW=small),
        seeds=[4, 5],
        shape_CHW=(3, 16, 16),
        config=FAST,
        stage=2,
    )
    assert torch.equal(found, expected)
    first = enlarge(denoiser, SR16, small, text(2), seeds=[4, 5], stage=1, config=FAST)
    assert not torch.equal(found, first)


def test_small_pictures_are_clipped_to_what_training_showed():
    """The base's estimates may leave [-1, 1] a little; its pictures do not."""
    denoiser, small = random_denoiser(3, SR16), 3 * torch.randn(1, 3, 8, 8)
    found, clipped = (
        enlarge(denoiser, SR16, picture, text(1), seeds=[0], stage=1, config=FAST)
        for picture in (small, small.clamp(-1, 1))
    )
    assert torch.equal(found, clipped)


def test_a_network_trained_on_patches_enlarges_whole_pictures_of_any_shape():
    """Fully convolutional: 8 x 12 px become 16 x 24."""
    patches = enlarging_config(8)
    small = torch.zeros(1, 3, 8, 12)
    found = enlarge(
        random_denoiser(0, patches), patches, small, text(1), seeds=[0], stage=1, config=FAST
    )
    assert found.shape == (1, 3, 16, 24)


def test_enlarging_by_the_exact_denoiser_gives_the_picture_it_believes_in():
    """The paper's sampler follows a denoiser that always answers the enlarged input, to it."""

    def believes(x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.low_res_BCHW is not None
        return functional.interpolate(conditioning.low_res_BCHW, scale_factor=2)

    small = torch.rand(2, 3, 8, 8) * 2 - 1
    found = enlarge(believes, SR16, small, text(2), seeds=[0, 1], stage=1, config=PAPER_ENLARGING)
    expected = functional.interpolate(small, scale_factor=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_paper_s_enlarging_is_its_table():
    """DEIS, exponent 3, 10 steps: 30 calls of the network, and one that reads off the picture."""
    assert (PAPER_ENLARGING.sampler, PAPER_ENLARGING.rho, PAPER_ENLARGING.num_steps) == (
        "deis",
        3.0,
        10,
    )


@pytest.mark.parametrize(
    ("config", "shape", "stage", "message"),
    [
        (base_config(), (1, 3, 8, 8), 1, "only a super-resolution network can enlarge"),
        (SR16, (1, 1, 8, 8), 1, "must have 3 channels, got 1"),
        (SR16, (1, 3, 8, 8), 0, "stage must be at least 1"),
        (SR16, (2, 3, 8, 8), 1, "low_res_BCHW must have batch_size 1, got 2"),
    ],
)
def test_what_cannot_be_enlarged_is_refused(config, shape, stage, message):
    """The message says what was required and found."""
    denoiser = random_denoiser(0, SR16)
    with pytest.raises(ValueError, match=message):
        enlarge(denoiser, config, torch.zeros(shape), text(1), seeds=[0], stage=stage, config=FAST)
