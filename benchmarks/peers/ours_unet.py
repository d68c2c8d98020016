"""Our U-Net, for `benchmarks.unet_vs_diffusers`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import serve
from benchmarks.peers.unet_step import Inputs, Side, case_of
from benchmarks.unet_vs_diffusers import NUM_TOKENS, TOKEN_WIDTH, Case
from ediffi.conditioning import Conditioning, Stream, StreamConfig
from ediffi.unet import UNet, UNetConfig


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
        torch.manual_seed(0)
        sizes = case_of(case)
        network = UNet(_config(sizes))

        def forward(batch: Inputs) -> Tensor:
            # The last token is the null token, which our network itself appends.
            stream = Stream(batch.tokens_BTD[:, :-1], batch.mask_BT[:, :-1])
            conditioning = Conditioning({"t5": stream}, len(batch.x_BCHW))
            return network(batch.x_BCHW, batch.c_noise_B, conditioning)

        self.side = Side(network, forward, sizes, precision)
        self.num_steps = sizes.num_steps
        facts = self.side.facts()
        self.side.seconds(1)
        return facts


def _config(case: Case) -> UNetConfig:
    assert NUM_TOKENS % 16 == 0, "else our context is padded, and does more work"
    return UNetConfig(
        image_px=case.image_px,
        patch_px=case.patch_px,
        widths=case.ours,
        num_blocks=case.num_blocks,
        self_attention_px=case.self_attention_px,
        cross_attention_px=case.cross_attention_px,
        head_width=case.head_width,
        context_width=case.context_width,
        streams=(StreamConfig(name="t5", token_width=TOKEN_WIDTH),),
    )


if __name__ == "__main__":
    serve(Session().handle)
