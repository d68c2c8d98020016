"""FID's Inception-v3: what sets it apart from torchvision's, and which files it takes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ediffi.features import extractor_identity, feature_extractor
from ediffi.inception import IMAGE_PX, inception, load_inception, prepare


def mean_inside(x_BCHW: Tensor) -> Tensor:
    """Sum of the 3 x 3 neighbourhood over the number of neighbours inside."""
    count = functional.conv2d(torch.ones_like(x_BCHW[:1, :1]), torch.ones(1, 1, 3, 3), padding=1)
    return 9 * functional.avg_pool2d(x_BCHW, 3, 1, 1) / count


def maximum(x_BCHW: Tensor) -> Tensor:
    """Maximum of the 3 x 3 neighbourhood."""
    unfolded = functional.pad(x_BCHW, (1, 1, 1, 1), value=-torch.inf)
    return unfolded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(-2).amax(-1)


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    """Random weights."""
    torch.manual_seed(0)
    return inception().eval()


@pytest.mark.parametrize(
    ("block", "channels", "pool"),
    [
        ("Mixed_5b", 192, mean_inside),
        ("Mixed_5d", 288, mean_inside),
        ("Mixed_6b", 768, mean_inside),
        ("Mixed_6e", 768, mean_inside),
        ("Mixed_7b", 1280, mean_inside),
        ("Mixed_7c", 2048, maximum),
    ],
)
@torch.no_grad()
def test_pooling_is_that_of_the_fid_network(
    network: torch.nn.Module, block: str, channels: int, pool: Callable[[Tensor], Tensor]
) -> None:
    """The last branch sees its own pooling, the others what torchvision's see."""
    layer = getattr(network, block)
    torchvision_block = type(layer).__mro__[2]
    x_BCHW = torch.rand(2, channels, 8, 8)
    *branches, pooled = layer._forward(x_BCHW)
    *expected, other = torchvision_block._forward(layer, x_BCHW)
    for ours, theirs in zip(branches, expected, strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(pooled, layer.branch_pool(pool(x_BCHW)))
    assert not torch.allclose(pooled, other)


def test_pictures_are_mapped_to_minus_one_and_one() -> None:
    """299 px, black to -1 and white to 1, resized without smoothing between pixel centres."""
    pictures = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    pictures[..., 1] = 255
    x_BCHW = prepare(pictures)
    assert x_BCHW.shape == (1, 3, IMAGE_PX, IMAGE_PX)
    assert (x_BCHW[..., 0] == -1).all()
    torch.testing.assert_close(x_BCHW[..., -1], torch.ones(1, 3, IMAGE_PX))
    assert x_BCHW[0, 0, 0, IMAGE_PX // 2].abs() < 1e-6


def test_features_are_what_the_classifier_would_get(
    network: torch.nn.Module, tmp_path: Path
) -> None:
    """A file of exactly these tensors gives 2048 features, batch independent."""
    path = tmp_path / "inception.pth"
    torch.save(network.state_dict(), path)
    config = {"kind": "inception", "weights": str(path)}
    pictures = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    features = feature_extractor(config)(pictures)
    assert features.shape == (2, 2048)
    with torch.no_grad():
        logits = network(prepare(pictures))
    torch.testing.assert_close(network.fc(features), logits, atol=1e-4, rtol=1e-4)
    assert set(extractor_identity(config)) == {"sha256"}


def test_another_inception_is_refused(tmp_path: Path) -> None:
    """torchvision's own has 1000 classes: its distances would be called FID wrongly."""
    from torchvision.models import Inception3

    torch.save(Inception3(aux_logits=False, init_weights=False).state_dict(), tmp_path / "tv.pth")
    with pytest.raises(ValueError, match=r"FID's Inception-v3 .* found \d+ tensors with other"):
        load_inception(tmp_path / "tv.pth")
