"""Which stream cross-attention looks at, by noise level (the paper's section 5 and its figures)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipelines.stages.evaluation.charts import Line, line_chart
from pipelines.stages.evaluation.material import Material, Measured

if TYPE_CHECKING:
    from torch import Tensor

PICTURE = "attention.png"


def measure_attention(material: Material) -> Measured:
    """Mean share of cross-attention a stream, `null` for the learned token, at each sigma.

    Held-out pictures are noised alike at every level and denoised by the ensemble. Image streams
    are dropped, as when one draws from text alone.
    """
    import torch

    from ediffi.attention_maps import attention_by_stream
    from ediffi.samplers import initial_noise

    config = material.recipe.evaluate.attention
    assert config is not None, "planned only where the recipe asks for it"
    generator, encoders = material.generator, material.recipe.encoders
    denoiser, num = generator.denoiser("ensemble"), 0
    found: dict[float, list[Mapping[str, Tensor]]] = defaultdict(list)
    for images_BCHW, conditioning in material.held_out_batches(config.num_samples):
        size, channels, height, width = images_BCHW.shape
        conditioning = conditioning.without(
            name for name in conditioning.streams if encoders[name].is_image
        )
        seeds = range(num, num + size)
        for sigma in config.sigmas:
            noise = initial_noise(seeds, (channels, height, width), sigma)
            x_BCHW = images_BCHW + noise.to(images_BCHW)
            sigma_B = torch.full((size,), sigma, device=images_BCHW.device)
            with torch.inference_mode():
                found[sigma].append(attention_by_stream(denoiser, x_BCHW, sigma_B, conditioning))
        num += size
    shares = _shares([found[sigma] for sigma in config.sigmas], material.recipe.seed)
    lines = [
        Line(label=name, x=config.sigmas, y=[one["value"] for one in levels])
        for name, levels in shares.items()
    ]
    line_chart(
        material.workspace.scratch / PICTURE,
        lines,
        x_label="sigma",
        y_label="share of cross-attention",
        x_scale="log",
    )
    document = {"sigmas": list(config.sigmas), "shares": shares, "num": num}
    return Measured(document={"attention": document}, pictures=(PICTURE,), num_in=num, num_out=num)


def _shares(
    found: Sequence[Sequence[Mapping[str, Tensor]]], seed: int
) -> dict[str, list[dict[str, float]]]:
    """Mean over all pictures at each noise level with its interval, by stream.

    Args:
        found: by noise level, then by batch, the shares (B,) of each stream.
        seed: of the bootstrap.
    """
    import torch

    from ediffi.metrics import resampled_mean

    return {
        name: [
            resampled_mean(torch.cat([batch[name] for batch in level]), seed=seed).to_json()
            for level in found
        ]
        for name in found[0][0]
    }
