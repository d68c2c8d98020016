"""Tests of ediffi.train.held_out and grid: what is measured, on which draws, by how many ranks."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ediffi.conditioning import collate
from ediffi.degradation import LowRes
from ediffi.efficient_unet import EfficientUNetConfig
from ediffi.loss import HELD_OUT_SEED, held_out_metrics, loss_by_sigma_bin
from ediffi.network import build_network
from ediffi.noise import WHOLE, NoiseInterval, SigmaDistribution, tree_node
from ediffi.preconditioning import Denoiser
from ediffi.shards import JoinedShards
from ediffi.snapshot import Snapshot, save_snapshot
from ediffi.train import held_out
from ediffi.train.engine import Worker, join_process_group
from ediffi.train.grid import GridConfig, tile
from ediffi.train.held_out import Watch
from ediffi.train.job import TrainJob
from ediffi.train.start import Start
from ediffi.unet import UNet
from tests.ediffi.train.toy import CONFIG, NETWORK, make_job

PAPER = SigmaDistribution()
NUM_SAMPLES = 32  # of 24 pictures: some are noised twice
GRID = GridConfig(num_pictures=5, num_steps=3, guidance=2.0, sampler="heun")


def random_weights(seed: int) -> dict[str, Tensor]:
    """Weights of the toy network that do answer something: its last layer starts at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = UNet(NETWORK)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return {name: weight.clone() for name, weight in network.state_dict().items()}


def watched(directory: Path, **changes: Any) -> TrainJob:
    """A job that watches the toy pictures."""
    job = make_job(directory)
    config = replace(CONFIG, held_out_images=32, held_out_samples=NUM_SAMPLES, grid_images=32)
    return replace(
        job,
        held_out=job.shards,
        config=config,
        grid=GRID,
        grid_path=directory / "grids",
        **changes,
    )


def parent_of(directory: Path, interval: NoiseInterval = WHOLE) -> Start:
    """A parent with random weights."""
    snapshot = Snapshot(
        network=NETWORK,
        preconditioning=make_job(directory).preconditioning,
        distribution=PAPER,
        interval=interval,
        images_seen=0,
    )
    save_snapshot(directory / "parent", snapshot, random_weights(1))
    return Start(snapshot=directory / "parent")


def watch(job: TrainJob, seed: int = 2) -> Watch:
    """Watch a job whose averaged weights are random, alone."""
    return Watch(job, lambda: random_weights(seed), join_process_group())


def evaluated(job: TrainJob, seed: int, batch_images: int = 8) -> dict[str, float]:
    """The figures that the evaluation of a finished model with these weights has."""
    network = UNet(NETWORK)
    network.load_state_dict(random_weights(seed))
    samples = JoinedShards(job.held_out, image_px=8)
    batches = []
    for start in range(0, len(samples), batch_images):
        batch = [samples[i] for i in range(start, min(start + batch_images, len(samples)))]
        images = torch.stack([one.image for one in batch]).float() / 127.5 - 1
        conditioning = collate([one.streams for one in batch], NETWORK.streams)
        batches.append((images, conditioning.to(dtype=torch.float32)))
    return held_out_metrics(
        loss_by_sigma_bin(
            Denoiser(network, job.preconditioning).eval(),
            itertools.cycle(batches),
            distribution=job.distribution,
            preconditioning=job.preconditioning,
            num_bins=8,
            draws_per_bin=job.config.held_out_samples,
            seed=HELD_OUT_SEED,
        )
    )


def bins_of(row: dict[str, float]) -> list[int]:
    """Numbers of the bins that a row has."""
    return sorted(int(key[-2:]) for key in row if "bin" in key)


def test_watching_gives_the_numbers_of_evaluation(tmp_path):
    """Same weights, same keys, same values: the draws and the samples are the same."""
    job = watched(tmp_path)
    found, expected = watch(job).measure(32), evaluated(job, 2)
    assert found == pytest.approx(expected, rel=1e-5)
    assert list(found) == list(expected)
    assert bins_of(found) == list(range(8))


def test_numbers_do_not_depend_on_the_number_of_ranks(tmp_path, monkeypatch):
    """Each rank measures whole batches; put together they are one rank's numbers bit by bit."""
    job = watched(tmp_path)
    expected = watch(job).measure(32)

    def parts(world_size: int) -> Tensor:
        """The sum of what the ranks would fill in."""
        filled = []
        monkeypatch.setattr(Watch, "_sum_over_ranks", lambda self, part: filled.append(part))
        for rank in range(world_size):
            one = Watch(job, lambda: random_weights(2), Worker(rank, world_size, job_device))
            one._losses(one._averaged(32), WHOLE)
        return torch.stack(filled)

    job_device = join_process_group().device
    for world_size in (2, 3, 7):
        filled = parts(world_size)
        assert ((filled != 0).sum(0) == 1).all()  # every draw by exactly one rank
        means = filled.sum(0).mean(1).tolist()
        assert means == [expected[f"held_out_loss/sigma_bin_{i:02d}"] for i in range(8)]


@pytest.mark.parametrize(
    ("interval", "bins"),
    [
        (tree_node(3, 0, PAPER), [0]),
        (tree_node(1, 1, PAPER), [4, 5, 6, 7]),
        (tree_node(5, 30, PAPER), [7]),
        (NoiseInterval(PAPER.quantile(0.2), PAPER.quantile(0.4)), [1, 2, 3]),
    ],
)
def test_expert_is_put_into_its_parent(tmp_path, interval, bins):
    """It measures the bins it touches, on the base's draws: those outside are the parent's."""
    job = watched(tmp_path, interval=interval, start=parent_of(tmp_path))
    row = watch(job).measure(32)
    assert bins_of(row) == bins
    base, expert = evaluated(job, 1), evaluated(job, 2)
    for number in bins:
        key = f"held_out_loss/sigma_bin_{number:02d}"
        low, high = PAPER.quantile(number / 8), PAPER.quantile((number + 1) / 8)
        if interval.sigma_min <= low and high <= interval.sigma_max:
            assert row[key] == pytest.approx(expert[key], rel=1e-5)
        else:
            assert row[key] not in (base[key], expert[key])


def test_expert_equal_to_its_parent_has_its_parents_numbers(tmp_path):
    """Paired draws: the difference between expert and base is exactly zero where they agree."""
    for number, interval in enumerate((tree_node(9, 511, PAPER), tree_node(2, 1, PAPER))):
        job = watched(tmp_path / str(number), interval=interval)
        job = replace(job, start=parent_of(tmp_path / str(number)))
        row = watch(job, seed=1).measure(32)
        base = evaluated(job, 1)
        assert row["held_out_loss"] == pytest.approx(row["held_out_loss_parent"], rel=1e-6)
        for number in bins_of(row):
            key = f"held_out_loss/sigma_bin_{number:02d}"
            assert row[key] == pytest.approx(base[key], rel=1e-5)


def test_held_out_loss_of_a_narrow_expert_rests_on_draws_of_its_own(tmp_path):
    """The whole axis in a hundred bins: one of them has a draw for every sample."""
    interval = NoiseInterval(PAPER.quantile(0.501), PAPER.quantile(0.502))
    job = watched(tmp_path, interval=interval, start=parent_of(tmp_path))
    one = watch(job)
    row = one.measure(32)
    own = one._sigma_SN[-1]
    assert len(own) == NUM_SAMPLES
    assert interval.contains(own).all()
    assert row["held_out_loss"] != row["held_out_loss_parent"]


def test_parent_that_knows_less_is_not_compared(tmp_path):
    """A parent of a narrower interval answers where it can: only whole bins have figures."""
    start = parent_of(tmp_path, tree_node(2, 3, PAPER))
    row = watch(watched(tmp_path, interval=tree_node(1, 1, PAPER), start=start)).measure(32)
    assert "held_out_loss_parent" not in row
    assert bins_of(row) == [4, 5, 6, 7]
    cut = NoiseInterval(PAPER.quantile(0.7), PAPER.quantile(0.95))
    assert bins_of(watch(watched(tmp_path, interval=cut, start=start)).measure(32)) == [6, 7]


def test_without_a_parent_cut_bins_are_left_out(tmp_path):
    """A bin's figure means the same in every run, or it is not there."""
    interval = NoiseInterval(PAPER.quantile(0.2), PAPER.quantile(0.6))
    job = watched(tmp_path, interval=interval)
    job = replace(job, config=replace(job.config, grid_images=0))
    row = watch(job).measure(32)
    assert bins_of(row) == [2, 3]
    assert "held_out_loss_parent" not in row
    assert math.isfinite(row["held_out_loss"])


def test_what_counts_is_the_interval_that_is_served(tmp_path):
    """An expert may be trained on its neighbours' noise too: that is not what it is for."""
    job = watched(tmp_path, interval=tree_node(1, 0, PAPER), start=parent_of(tmp_path))
    wide, narrow = watch(job), watch(replace(job, serves=tree_node(3, 2, PAPER)))
    assert bins_of(wide.measure(32)) == [0, 1, 2, 3]
    row = narrow.measure(32)
    assert bins_of(row) == [2]
    assert row["held_out_loss"] == row["held_out_loss/sigma_bin_02"]


def test_parent_is_measured_once(tmp_path, monkeypatch):
    """Its losses never change; only the run's own weights are asked again."""
    loads = []
    original = held_out.load_snapshot
    monkeypatch.setattr(held_out, "load_snapshot", lambda path: loads.append(1) or original(path))
    job = watched(tmp_path, interval=tree_node(3, 0, PAPER), start=parent_of(tmp_path))
    one = watch(job)
    assert one.measure(32) == one.measure(64)
    assert len(loads) == 1


def test_averaged_weights_are_gathered_once_for_measuring_and_drawing(tmp_path):
    """Gathering is collective and dear; new images need new weights."""
    gathered = []

    def averages() -> dict[str, Tensor]:
        gathered.append(1)
        return random_weights(len(gathered))

    one = Watch(watched(tmp_path), averages, join_process_group())
    first = one.measure(32)
    one.draw(32)
    assert len(gathered) == 1
    assert one.measure(64) != first


def test_neither_measuring_nor_drawing_touches_random_state(tmp_path):
    """Rows of training are equal with and without them."""
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    job = watched(tmp_path, interval=tree_node(1, 0, PAPER), start=parent_of(tmp_path))
    one = watch(job)
    one.measure(32)
    one.draw(32)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_grid_is_written_whole_and_says_how_far_training_was(tmp_path):
    """One picture of drawn and real pictures; drawing it again gives the same bytes."""
    job = watched(tmp_path)
    watch(job).draw(64)
    (path,) = job.grid_path.iterdir()
    assert path.name == "images-0000000064.png"
    first = path.read_bytes()
    with Image.open(path) as image:
        assert image.size == (5 * 64 + 4 * 2, 2 * 64 + 2)
    watch(job).draw(64)
    assert path.read_bytes() == first
    watch(job, seed=3).draw(64)
    assert path.read_bytes() != first


def test_real_pictures_stand_below_the_drawn_ones(tmp_path):
    """The toy pictures have one colour each: the lower row shows them."""
    job = watched(tmp_path)
    watch(job).draw(64)
    with Image.open(job.grid_path / "images-0000000064.png") as image:
        pixels = np.asarray(image)
    samples = JoinedShards(job.held_out, image_px=8)
    for index in range(5):
        shown = pixels[66:, index * 66 : index * 66 + 64]
        assert (shown == samples[index].image[:, 0, 0].numpy()).all()


def test_pictures_of_an_expert_need_its_parent(tmp_path, caplog):
    """Where even the parent does not know the whole axis, it says so and draws nothing."""
    narrow = tree_node(1, 1, PAPER)
    job = watched(tmp_path, interval=tree_node(2, 3, PAPER), start=parent_of(tmp_path, narrow))
    watch(job).draw(32)
    assert "no grid" in caplog.text
    assert not job.grid_path.exists()
    with pytest.raises(ValueError, match=r"grid_images must be 0 .* without a parent"):
        watch(replace(job, start=None))


def test_grid_of_an_expert_shows_both_networks(tmp_path):
    """It differs from the parent's own and from the expert's alone."""
    grids = []
    start = parent_of(tmp_path)
    for name, interval, seed in (
        ("parent", WHOLE, 1),
        ("expert", WHOLE, 2),
        ("both", tree_node(1, 1, PAPER), 2),
    ):
        job = watched(tmp_path, interval=interval, start=start)
        job = replace(job, grid_path=tmp_path / name)
        watch(job, seed).draw(32)
        grids.append((tmp_path / name / "images-0000000032.png").read_bytes())
    assert len(set(grids)) == 3


def test_dropped_streams_are_not_given_to_the_model(tmp_path):
    """With every stream dropped all pictures come from the seed alone, guided or not."""
    dropped = replace(GRID, dropped_streams=("t5", "clip_image"))
    pictures = []
    for name, grid in (
        ("guided", dropped),
        ("plain", replace(dropped, guidance=1.0)),
        ("told", GRID),
    ):
        job = replace(watched(tmp_path), grid=grid, grid_path=tmp_path / name)
        watch(job).draw(32)
        with Image.open(tmp_path / name / "images-0000000032.png") as image:
            pictures.append(np.asarray(image).astype(int))
    assert abs(pictures[0] - pictures[1]).max() <= 1  # rounding
    assert abs(pictures[0] - pictures[2]).max() > 1


def test_super_resolution_is_watched_on_centre_patches(tmp_path):
    """The input stands above what is drawn and the real patch; its degradation never changes."""
    network = EfficientUNetConfig(
        image_px=8, low_res_factor=2, widths=(8, 8), num_blocks=(1, 1), embedding_width=8
    )
    job = replace(watched(tmp_path), network=network, picture_px=16, low_res=LowRes(factor=2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = build_network(network).state_dict()
    one = Watch(job, lambda: weights, join_process_group())
    assert one.measure(32) == Watch(job, lambda: weights, join_process_group()).measure(32)
    images_BCHW, conditioning = one._read(range(3))
    assert images_BCHW.shape == (3, 3, 8, 8)
    assert conditioning.low_res_BCHW.shape == (3, 3, 4, 4)
    one.draw(32)
    with Image.open(job.grid_path / "images-0000000032.png") as image:
        assert image.size == (5 * 64 + 4 * 2, 3 * 64 + 2 * 2)


@pytest.mark.parametrize(
    ("lacking", "named"),
    [
        ({"held_out": ()}, "held-out samples"),
        ({"grid": None}, "grid"),
        ({"grid_path": None}, "path"),
    ],
)
def test_missing_parts_are_named(tmp_path, lacking, named):
    """A job that asks to be watched must have what that takes."""
    with pytest.raises(ValueError, match=named):
        watch(replace(watched(tmp_path), **lacking))


def test_an_unwatched_job_needs_nothing(tmp_path):
    """Neither samples nor a grid, and nothing is drawn."""
    job = make_job(tmp_path)
    watch(job)
    assert not job.held_out
    assert job.grid_path is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_pictures": 0}, "num_pictures"),
        ({"seed": -1}, "seed"),
        ({"sigma_min": 90.0}, "sigma_min"),
    ],
)
def test_grid_settings_are_checked(changes, named):
    """Before any training."""
    with pytest.raises(ValueError, match=named):
        replace(GRID, **changes)


def test_tiles_are_enlarged_and_wrapped_after_eight():
    """Ten samples of 32 px with inputs of 16 px: two blocks of two rows, all at 64 px."""
    large = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 32, 32)
    small = 100 + large[:, :, :16, :16]
    canvas = tile([small, large])
    assert canvas.shape == (4 * 64 + 2 * 2 + 4, 8 * 64 + 7 * 2, 3)
    assert (canvas[:64, :64] == 100).all()
    assert (canvas[66:130, 66:130] == 1).all()
    assert (canvas[134:198, 66:130] == 109).all()
    assert (canvas[200:264, 66:130] == 9).all()
    assert (canvas[134:, 132:] == 255).all()
