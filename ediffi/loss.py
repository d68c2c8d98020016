"""The denoising loss and its report by noise level.

E[lambda(sigma) ||D(y + sigma n) - y||^2] with lambda = 1 / c_out^2 (eDiff-I section 3, EDM
equation 2). The loss of a diffusion model says little as one number: it spans orders of magnitude
along sigma, and experts differ on their own slice only. Hence the report by equal-probability
bins, on noise that is the same for every model.

Shape legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ediffi.conditioning import Conditioning
from ediffi.noise import NoiseInterval, SigmaDistribution
from ediffi.preconditioning import DenoiserFn, Preconditioning

# Of every run, training and evaluation alike, whatever its own seed: their figures are comparable
# draw by draw only because the draws are the same.
NUM_SIGMA_BINS = 8
HELD_OUT_SEED = 0
HELD_OUT_LOSS = "held_out_loss"


def denoising_loss(
    denoiser: DenoiserFn,
    images_BCHW: Tensor,
    sigma_B: Tensor,
    noise_BCHW: Tensor,
    conditioning: Conditioning,
    preconditioning: Preconditioning,
) -> Tensor:
    """Weighted squared error of each picture, (B,): lambda(sigma) * mean over C, H, W.

    Args:
        denoiser: the model.
        images_BCHW: clean pictures in [-1, 1].
        sigma_B: one positive noise level per picture.
        noise_BCHW: standard normal.
        conditioning: one entry per picture.
        preconditioning: gives lambda; at initialisation the loss is about 1 at every sigma.
    """
    noisy_BCHW = images_BCHW + sigma_B[:, None, None, None] * noise_BCHW
    error_BCHW = denoiser(noisy_BCHW, sigma_B, conditioning) - images_BCHW
    return preconditioning.loss_weight(sigma_B) * error_BCHW.square().mean(dim=(1, 2, 3))


@dataclass(frozen=True, kw_only=True)
class BinLoss:
    """Mean loss over noise levels in [sigma_min, sigma_max)."""

    index: int  # 0 is the least noisy bin
    sigma_min: float
    sigma_max: float
    mean: float
    standard_error: float
    num: int  # draws behind the mean


def sigma_bins(num_bins: int, distribution: SigmaDistribution) -> tuple[NoiseInterval, ...]:
    """Cut the noise axis into intervals of equal probability, least noisy first.

    Raises:
        ValueError: `num_bins` is less than 1.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    edges = [index / num_bins for index in range(num_bins + 1)]
    slices = itertools.pairwise(edges)
    return tuple(NoiseInterval.from_quantiles(low, high, distribution) for low, high in slices)


@torch.no_grad()
def loss_by_sigma_bin(
    denoiser: DenoiserFn,
    batches: Iterable[tuple[Tensor, Conditioning]],
    *,
    distribution: SigmaDistribution,
    preconditioning: Preconditioning,
    num_bins: int,
    draws_per_bin: int,
    seed: int,
) -> list[BinLoss]:
    """Mean loss in each noise bin over the first `draws_per_bin` samples of `batches`.

    Every sample is noised once per bin, and the draw is a function of (seed, sample index, bin)
    alone: two models, or one model in other batches, are compared on equal noise.

    Args:
        denoiser: base, expert or ensemble, in eval mode.
        batches: pairs of (B, C, H, W) float pictures in [-1, 1] and their conditioning, in a fixed
            order. `itertools.cycle` gives each picture several draws, each with new noise.
        distribution: its quantiles are the bin edges, and noise follows it inside each bin.
        preconditioning: gives the loss weight.
        num_bins: bins of equal probability.
        draws_per_bin: samples used, at least 2.
        seed: not negative.

    Raises:
        ValueError: fewer than 2 draws asked, or `batches` hold fewer samples than that.
    """
    bins = sigma_bins(num_bins, distribution)
    losses: list[list[Tensor]] = [[] for _ in bins]
    for first_index, images_BCHW, conditioning in _first_samples(batches, draws_per_bin):
        indices = range(first_index, first_index + len(images_BCHW))
        for bin_index, interval in enumerate(bins):
            sigma_B, noise_BCHW = paired_draws(
                distribution, interval, images_BCHW.shape[1:], seed, indices, bin_index
            )
            loss_B = denoising_loss(
                denoiser,
                images_BCHW,
                sigma_B.to(images_BCHW.device),
                noise_BCHW.to(images_BCHW.device),
                conditioning,
                preconditioning,
            )
            losses[bin_index].append(loss_B.double().cpu())
    return [
        _bin_loss(index, interval, torch.cat(parts))
        for index, (interval, parts) in enumerate(zip(bins, losses))
    ]


def held_out_metrics(losses: Sequence[BinLoss]) -> dict[str, float]:
    """The report under the names that training, and every model's evaluation, give it.

    Returns:
        "held_out_loss", the mean over p(sigma), and "held_out_loss/sigma_bin_00" and on.
    """
    bins = {sigma_bin_key(HELD_OUT_LOSS, one.index, len(losses)): one.mean for one in losses}
    return {HELD_OUT_LOSS: sum(bins.values()) / len(bins), **bins}


def sigma_bin_key(name: str, bin_index: int, num_bins: int = NUM_SIGMA_BINS) -> str:
    """Name of a figure of one noise bin, as in `loss/sigma_bin_03`; 0 is the least noisy.

    Bins of other numbers are other bins, and say so: `loss/sigma_bin_03_of_16`.
    """
    other = "" if num_bins == NUM_SIGMA_BINS else f"_of_{num_bins}"
    return f"{name}/sigma_bin_{bin_index:02d}{other}"


def _first_samples(
    batches: Iterable[tuple[Tensor, Conditioning]], num_samples: int
) -> Iterator[tuple[int, Tensor, Conditioning]]:
    """Yield (index of the first sample, images, conditioning) up to `num_samples` in all."""
    if num_samples < 2:
        raise ValueError(f"draws_per_bin must be at least 2 for an error bar, got {num_samples}")
    num_seen = 0
    for images_BCHW, conditioning in batches:
        num_taken = min(len(images_BCHW), num_samples - num_seen)
        if num_taken < len(images_BCHW):
            images_BCHW = images_BCHW[:num_taken]
            conditioning = conditioning.select(torch.arange(num_taken))
        yield num_seen, images_BCHW, conditioning
        num_seen += num_taken
        if num_seen == num_samples:
            return
    raise ValueError(
        f"draws_per_bin={num_samples} needs as many samples, got {num_seen}: lower it, or pass "
        "itertools.cycle(batches) to draw several times per sample"
    )


def paired_draws(
    distribution: SigmaDistribution,
    interval: NoiseInterval,
    shape_CHW: Sequence[int],
    seed: int,
    sample_indices: Sequence[int],
    stratum: int,
) -> tuple[Tensor, Tensor]:
    """Noise levels and noise of some samples, each a function of (seed, sample, stratum) alone.

    Args:
        distribution: what the noise levels follow.
        interval: where they lie; one of `sigma_bins` for the report.
        shape_CHW: of a picture.
        seed: not negative.
        sample_indices: one draw for each.
        stratum: the bin's number; another one gives other noise.

    Returns:
        sigma_B (B,) float32 and standard normal noise_BCHW float32, on the CPU.
    """
    generators = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, index, stratum))))
        for index in sample_indices
    ]
    u_B = torch.tensor([generator.random() for generator in generators], dtype=torch.float64)
    noise = [generator.standard_normal(shape_CHW, dtype=np.float32) for generator in generators]
    return distribution.sigma_at(u_B, interval), torch.from_numpy(np.stack(noise))


def _bin_loss(index: int, interval: NoiseInterval, loss_N: Tensor) -> BinLoss:
    return BinLoss(
        index=index,
        sigma_min=interval.sigma_min,
        sigma_max=interval.sigma_max,
        mean=loss_N.mean().item(),
        standard_error=loss_N.std().item() / math.sqrt(len(loss_N)),
        num=len(loss_N),
    )
