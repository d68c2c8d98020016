"""The Inception-v3 of the Fréchet Inception distance, for whoever has its weights.

The network of FID (Heusel et al. 2017) is TensorFlow's Inception of December 2015, not that of
torchvision: 1008 classes, average pooling that leaves the border out of its mean, and maximum
pooling in the very last block. The parameters carry torchvision's names, so torchvision's layers
are used and only the pooling is put right. Its weights come as a PyTorch state dict, such as
`pt_inception-2015-12-05-6726825d.pth`; they cannot be made here, and without them there is no FID.

Pictures are brought to 299 px bilinearly without smoothing and mapped to [-1, 1], as the public
ports to PyTorch do. TensorFlow's own resize places pixels slightly otherwise.

Shape legend: B batch, C channels, H W pixels, D = 2048 features.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

NUM_CLASSES = 1008
IMAGE_PX = 299
_EXAMPLE = "pt_inception-2015-12-05-6726825d.pth"


def load_inception(weights: Path) -> nn.Module:
    """Build the network and fill it; it maps prepared pictures to (B, D) features.

    Raises:
        ValueError: the file does not hold exactly this network's tensors.
    """
    network = inception()
    own = network.state_dict()
    state = torch.load(weights, map_location="cpu", weights_only=True)
    found = {name: tuple(one.shape) for name, one in state.items()}
    if found != {name: tuple(one.shape) for name, one in own.items()}:
        raise ValueError(
            f"weights must be FID's Inception-v3 as a PyTorch state dict (torchvision's names, "
            f"{NUM_CLASSES} classes, no auxiliary classifier), found {len(found)} tensors with "
            f"other names or shapes in {weights}: take {_EXAMPLE}. Weights of torchvision or timm "
            "are another network, whose distances are no FID; use kind timm for them"
        )
    network.load_state_dict(state)
    network.fc = nn.Identity()
    return network.eval().requires_grad_(False)


def inception() -> Any:
    """FID's Inception-v3 with random weights and its classifier."""
    from torchvision.models import inception as layers  # type: ignore[import-untyped]

    def pooling(block: type[nn.Module], pool: Callable[[Tensor], Tensor]) -> type[nn.Module]:
        return type(f"Fid{block.__name__}", (_OtherPool, block), {"pool": staticmethod(pool)})

    network = layers.Inception3(
        num_classes=NUM_CLASSES,
        aux_logits=False,
        inception_blocks=[
            layers.BasicConv2d,
            pooling(layers.InceptionA, _mean_inside),
            layers.InceptionB,
            pooling(layers.InceptionC, _mean_inside),
            layers.InceptionD,
            pooling(layers.InceptionE, _mean_inside),
            layers.InceptionAux,
        ],
        init_weights=False,
    )
    network.Mixed_7c = pooling(layers.InceptionE, _maximum)(2048)
    return network


def prepare(pictures_BCHW: Tensor) -> Tensor:
    """Pictures of values 0 to 255 as the network wants them, float32 (B, 3, 299, 299)."""
    x_BCHW = pictures_BCHW.float() / 255.0
    x_BCHW = functional.interpolate(
        x_BCHW, (IMAGE_PX, IMAGE_PX), mode="bilinear", align_corners=False
    )
    return 2.0 * x_BCHW - 1.0


class _OtherPool:
    """A block of torchvision with another pooling in front of its last branch."""

    pool: Callable[[Tensor], Tensor]
    branch_pool: nn.Module

    def _forward(self, x_BCHW: Tensor) -> list[Tensor]:
        *branches, _ = super()._forward(x_BCHW)  # type: ignore[misc]
        return [*branches, self.branch_pool(self.pool(x_BCHW))]


def _mean_inside(x_BCHW: Tensor) -> Tensor:
    """Mean of the 3 x 3 neighbours that lie inside the picture."""
    return functional.avg_pool2d(x_BCHW, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x_BCHW: Tensor) -> Tensor:
    return functional.max_pool2d(x_BCHW, 3, stride=1, padding=1)
