"""Held-out loss by noise level, of base and ensemble on equal samples, sigmas and noise."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict
from typing import TYPE_CHECKING

from pipelines.stage import Json
from pipelines.stages.evaluation.charts import Line, line_chart
from pipelines.stages.evaluation.material import Material, Measured
from pipelines.stages.sample import MODELS

if TYPE_CHECKING:
    from ediffi.loss import BinLoss

PICTURE = "loss_by_sigma.png"


def measure_losses(material: Material) -> Measured:
    """Mean loss of each model in each noise bin, and the two as a chart."""
    losses = _losses(material)
    lines = [
        Line(
            label=model,
            x=[one.index for one in bins],
            y=[one.mean for one in bins],
            error=[one.standard_error for one in bins],
        )
        for model, bins in losses.items()
    ]
    line_chart(
        material.workspace.scratch / PICTURE,
        lines,
        x_label="noise bin, least noisy first",
        y_label="held-out loss",
    )
    num = material.recipe.evaluate.draws_per_bin
    return Measured(
        document={
            "loss": {model: [_to_json(one) for one in bins] for model, bins in losses.items()}
        },
        pictures=(PICTURE,),
        num_in=num,
        num_out=num,
    )


def _to_json(one: BinLoss) -> Json:
    """The last bin has no upper end; JSON has no infinity, so it is the string "inf"."""
    sigma_max = "inf" if math.isinf(one.sigma_max) else one.sigma_max
    return {**asdict(one), "sigma_max": sigma_max}


def _losses(material: Material) -> dict[str, list[BinLoss]]:
    from ediffi.loss import HELD_OUT_SEED, loss_by_sigma_bin

    config, generator = material.recipe.evaluate, material.generator
    batches = list(material.held_out_batches(config.draws_per_bin))
    return {
        model: loss_by_sigma_bin(
            generator.denoiser(model),
            itertools.cycle(batches),
            distribution=generator.info.distribution,
            preconditioning=generator.info.preconditioning,
            num_bins=config.num_bins,
            draws_per_bin=config.draws_per_bin,
            seed=HELD_OUT_SEED,
        )
        for model in MODELS
    }
