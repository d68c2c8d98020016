"""Tests of ediffi.loss: closed forms of the loss and pairing of the report's noise."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from ediffi.conditioning import Conditioning
from ediffi.loss import (
    BinLoss,
    denoising_loss,
    held_out_metrics,
    loss_by_sigma_bin,
    paired_draws,
    sigma_bins,
)
from ediffi.noise import SigmaDistribution, check_tiling
from ediffi.preconditioning import Preconditioning

PAPER = SigmaDistribution()
EDM = Preconditioning()


class Calls:
    """A denoiser that answers `x` scaled by a factor and remembers what it was asked."""

    def __init__(self, factor: float = 0.5) -> None:
        self.factor = factor
        self.asked: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.batch_size == len(x_BCHW)
        self.asked.append((x_BCHW, sigma_B))
        return self.factor * x_BCHW


def ideal_denoiser(x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
    """Best estimate when the data are N(0, sigma_data^2)."""
    return EDM.c_skip(sigma_B)[:, None, None, None] * x_BCHW


def batches_of(images_BCHW: Tensor, size: int) -> list[tuple[Tensor, Conditioning]]:
    """Cut pictures into batches of unconditional samples."""
    return [(part, Conditioning({}, len(part))) for part in images_BCHW.split(size)]


def report(denoiser, images_BCHW, size, *, draws=12, seed=0, num_bins=4):
    """Run the report with the paper's distribution."""
    return loss_by_sigma_bin(
        denoiser,
        batches_of(images_BCHW, size),
        distribution=PAPER,
        preconditioning=EDM,
        num_bins=num_bins,
        draws_per_bin=draws,
        seed=seed,
    )


def pictures(num: int, px: int = 4) -> Tensor:
    """Gaussian pictures with the preconditioning's own standard deviation."""
    return 0.5 * torch.randn(num, 3, px, px, generator=torch.Generator().manual_seed(1))


def test_loss_of_a_perfect_answer_is_zero_and_of_an_offset_is_its_weighted_square():
    """An answer wrong by d everywhere costs lambda(sigma) d^2, per sample."""
    images_BCHW, noise_BCHW = pictures(3), torch.randn(3, 3, 4, 4)
    sigma_B = torch.tensor([0.1, 1.0, 10.0])
    for offset in (0.0, 0.3):
        loss_B = denoising_loss(
            lambda x, sigma, conditioning, offset=offset: images_BCHW + offset,
            images_BCHW,
            sigma_B,
            noise_BCHW,
            Conditioning({}, 3),
            EDM,
        )
        torch.testing.assert_close(loss_B, EDM.loss_weight(sigma_B) * offset**2)


def test_denoiser_is_given_image_plus_sigma_times_noise():
    """The noised picture carries each sample's own noise level."""
    images_BCHW, noise_BCHW = pictures(2), torch.randn(2, 3, 4, 4)
    calls, sigma_B = Calls(), torch.tensor([0.5, 4.0])
    denoising_loss(calls, images_BCHW, sigma_B, noise_BCHW, Conditioning({}, 2), EDM)
    ((x_BCHW, asked_sigma_B),) = calls.asked
    torch.testing.assert_close(x_BCHW[1], images_BCHW[1] + 4.0 * noise_BCHW[1])
    assert asked_sigma_B is sigma_B


def test_ideal_gaussian_denoiser_has_unit_loss_in_every_bin():
    """On N(0, sigma_data^2) data the skip path alone is optimal and its weighted loss is 1."""
    for bin_loss in report(ideal_denoiser, pictures(64, px=16), 32, draws=64, num_bins=8):
        assert bin_loss.mean == pytest.approx(1.0, abs=5 * bin_loss.standard_error)
        assert bin_loss.standard_error < 0.02


def test_bins_have_equal_probability_and_tile_the_axis():
    """Bin edges are the quantiles k / num_bins."""
    bins = sigma_bins(5, PAPER)
    check_tiling({str(index): interval for index, interval in enumerate(bins)})
    assert [interval.mass(PAPER) for interval in bins] == pytest.approx([0.2] * 5)
    with pytest.raises(ValueError, match="num_bins"):
        sigma_bins(0, PAPER)


def test_report_is_stratified_and_labels_its_bins():
    """Every bin gets as many draws, all of them inside its edges."""
    calls, num_bins = Calls(), 4
    losses = report(calls, pictures(12), 6, num_bins=num_bins)
    assert [bin_loss.index for bin_loss in losses] == [0, 1, 2, 3]
    assert {bin_loss.num for bin_loss in losses} == {12}
    assert losses[-1].sigma_max == math.inf
    for call_index, (_, sigma_B) in enumerate(calls.asked):
        bin_loss = losses[call_index % num_bins]
        assert (bin_loss.sigma_min <= sigma_B).all()
        assert (sigma_B < bin_loss.sigma_max).all()


def draws_by_sample(batch_size: int, seed: int, draws: int = 12) -> list[Tensor]:
    """Noised pictures of each bin, in sample order, as the denoiser saw them."""
    calls = Calls()
    report(calls, pictures(12), batch_size, draws=draws, seed=seed)
    return [torch.cat([x for x, _ in calls.asked[index::4]]) for index in range(4)]


def test_noise_depends_on_seed_sample_and_bin_but_not_on_batching():
    """Any batch size, and any number of draws, gives each sample the same noise bit for bit."""
    reference = draws_by_sample(12, seed=3)
    for batch_size, draws in ((1, 12), (5, 12), (4, 7)):
        for expected, found in zip(reference, draws_by_sample(batch_size, 3, draws)):
            assert torch.equal(expected[:draws], found)
    assert not torch.equal(reference[0], draws_by_sample(12, seed=4)[0])
    # No two (sample, bin) cells share their noise.
    noise = torch.cat([x - pictures(12) for x in reference]).flatten(1)
    correlation = torch.corrcoef(noise) - torch.eye(len(noise))
    assert correlation.abs().max() < 0.75


def test_report_does_not_touch_global_random_state():
    """Evaluating in the middle of training leaves the training's random numbers alone."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    report(Calls(), pictures(12), 6)
    assert torch.equal(torch.rand(3), expected)


def test_mean_and_standard_error_are_those_of_the_losses():
    """The report's numbers match a direct computation from the same draws."""
    calls = Calls()
    (found, *_) = report(calls, pictures(12), 12)
    x_BCHW, sigma_B = calls.asked[0]
    error = (0.5 * x_BCHW - pictures(12)).double().square().mean(dim=(1, 2, 3))
    loss_B = EDM.loss_weight(sigma_B.double()) * error
    assert found.mean == pytest.approx(loss_B.mean().item(), rel=1e-5)
    assert found.standard_error == pytest.approx(loss_B.std().item() / math.sqrt(12), rel=1e-5)


def test_too_few_samples_are_an_error_that_names_the_remedy():
    """A report on fewer draws than asked would not be comparable; cycling repeats the pictures."""
    with pytest.raises(ValueError, match=r"draws_per_bin=20 .* got 12.*itertools\.cycle"):
        report(Calls(), pictures(12), 6, draws=20)
    with pytest.raises(ValueError, match="at least 2"):
        report(Calls(), pictures(12), 6, draws=1)
    losses = loss_by_sigma_bin(
        Calls(),
        itertools.cycle(batches_of(pictures(12), 5)),
        distribution=PAPER,
        preconditioning=EDM,
        num_bins=2,
        draws_per_bin=20,
        seed=0,
    )
    assert [bin_loss.num for bin_loss in losses] == [20, 20]


def test_noise_levels_are_the_same_whether_or_not_the_noise_is_drawn():
    """Sigma comes first out of each draw, so that it can be had alone."""
    interval = sigma_bins(4, PAPER)[2]
    whole, noise_BCHW = paired_draws(PAPER, interval, (3, 4, 4), 7, range(5), 2)
    alone, _ = paired_draws(PAPER, interval, (), 7, range(5), 2)
    assert torch.equal(whole, alone)
    assert noise_BCHW.shape == (5, 3, 4, 4)


def bin_losses(*means: float) -> list[BinLoss]:
    """Bins with these means."""
    return [
        BinLoss(index=i, sigma_min=0.0, sigma_max=1.0, mean=mean, standard_error=0.1, num=2)
        for i, mean in enumerate(means)
    ]


def test_held_out_metrics_name_the_mean_and_every_bin():
    """Octiles have the names that training gives them; other bins cannot be taken for octiles."""
    octiles = held_out_metrics(bin_losses(*range(8)))
    assert octiles["held_out_loss"] == 3.5
    assert octiles["held_out_loss/sigma_bin_07"] == 7
    assert len(octiles) == 9
    assert held_out_metrics(bin_losses(1.0, 3.0)) == {
        "held_out_loss": 2.0,
        "held_out_loss/sigma_bin_00_of_2": 1.0,
        "held_out_loss/sigma_bin_01_of_2": 3.0,
    }
