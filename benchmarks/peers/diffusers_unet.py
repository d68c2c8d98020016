"""diffusers' UNet2DConditionModel, for `benchmarks.unet_vs_diffusers`."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.peers import serve
from benchmarks.peers.unet_step import Inputs, Side, case_of
from benchmarks.unet_vs_diffusers import TOKEN_WIDTH, Case

# Down, up and middle, with and without cross-attention; what else those models set.
_BLOCKS: dict[str, dict[str, Any]] = {
    "stable_diffusion": {
        "with": ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"),
        "without": ("DownBlock2D", "UpBlock2D"),
        "middle": "UNetMidBlock2DCrossAttn",
        "settings": {},
    },
    "deepfloyd_if": {
        "with": ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"),
        "without": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
        "middle": "UNetMidBlock2DSimpleCrossAttn",
        "settings": {"resnet_time_scale_shift": "scale_shift"},
    },
}
_TIMESTEPS = 250  # c_noise of about [-2, 1.2] becomes what its sinusoids are made for


class Session:
    """The network that was built last."""

    def __init__(self) -> None:
        self.side: Side | None = None
        self.num_steps = 0

    def handle(self, action: str, **request: Any) -> dict[str, Any]:
        """Build a network, or time some steps of it."""
        if action == "build":
            return self._build(**request)
        assert self.side is not None, "built first"
        return {"seconds": self.side.seconds(self.num_steps)}

    def _build(
        self, case: dict[str, Any], blocks: str, precision: str, num_threads: int
    ) -> dict[str, Any]:
        torch.set_num_threads(num_threads)
        sizes = case_of(case)
        self.num_steps = sizes.num_steps
        trials = {}
        for channels_last, fused in itertools.product((False, True), (True, False)):
            side = _side(sizes, blocks, precision, channels_last, fused)
            side.seconds(1)
            name = f"{'NHWC' if channels_last else 'NCHW'}, {'sdpa' if fused else 'plain'}"
            trials[name] = (min(side.seconds(1) for _ in range(3)), side)
        fastest = min(trials, key=lambda name: trials[name][0])
        self.side = trials[fastest][1]
        tried = {name: round(seconds, 3) for name, (seconds, _) in trials.items()}
        return {**self.side.facts(), "fastest": fastest, "step_s": tried}


def _side(case: Case, blocks: str, precision: str, channels_last: bool, fused: bool) -> Side:
    torch.manual_seed(0)
    network = _network(case, blocks)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    processors = importlib.import_module("diffusers.models.attention_processor")
    if blocks == "deepfloyd_if":
        name = "AttnAddedKVProcessor2_0" if fused else "AttnAddedKVProcessor"
    else:
        name = "AttnProcessor2_0" if fused else "AttnProcessor"
    network.set_attn_processor(getattr(processors, name)())
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def forward(batch: Inputs) -> Tensor:
        folded = functional.pixel_unshuffle(batch.x_BCHW, case.patch_px)
        found = network(
            folded.to(memory_format=layout),
            batch.c_noise_B * _TIMESTEPS,
            encoder_hidden_states=batch.tokens_BTD,
            encoder_attention_mask=batch.mask_BT,
        )
        return functional.pixel_shuffle(found.sample, case.patch_px)

    return Side(network, forward, case, precision)


def _network(case: Case, blocks: str) -> Any:
    kinds, widths = _BLOCKS[blocks], getattr(case, blocks)
    feature_px = [case.image_px // case.patch_px >> level for level in range(len(widths))]
    attends = ["with" if px in case.cross_attention_px else "without" for px in feature_px]
    channels = 3 * case.patch_px**2
    # Stable Diffusion's blocks read `attention_head_dim` as the number of heads.
    heads = [max(1, round(width / case.head_width)) for width in widths]
    is_number = blocks == "stable_diffusion"
    diffusers = importlib.import_module("diffusers")
    network = diffusers.UNet2DConditionModel(
        sample_size=feature_px[0],
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=case.num_blocks,
        down_block_types=tuple(kinds[name][0] for name in attends),
        mid_block_type=kinds["middle"],
        up_block_types=tuple(kinds[name][1] for name in reversed(attends)),
        cross_attention_dim=TOKEN_WIDTH,
        attention_head_dim=tuple(heads) if is_number else case.head_width,
        norm_num_groups=8,
        **kinds["settings"],
    )
    return network.train()


if __name__ == "__main__":
    serve(Session().handle)
