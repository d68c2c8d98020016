"""Tests of ediffi.train.grid: drawing is ediffi.sampling's, seed by place in the grid."""

import pytest
import torch
from torch import Tensor

from ediffi.conditioning import Conditioning, Stream
from ediffi.sampling import draw, to_uint8
from ediffi.train.grid import GridConfig, draw_pictures

SHAPE = (3, 4, 4)


def coloured(x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
    """The exact denoiser of pictures of deviation 0.5 around the streams' vectors."""
    vectors = [stream.pooled_BD for stream in conditioning.streams.values()]
    mean_BC11 = sum(vectors)[:, :, None, None]
    share_B111 = (0.25 / (0.25 + sigma_B**2))[:, None, None, None]
    return mean_BC11 + share_B111 * (x_BCHW - mean_BC11)


def conditioning_of(num_pictures: int) -> Conditioning:
    """Two streams with a vector a picture."""
    pooled_BD = 0.03 * torch.arange(3.0 * num_pictures).view(num_pictures, 3)
    streams = {"text": Stream(pooled_BD=pooled_BD), "image": Stream(pooled_BD=-2 * pooled_BD)}
    return Conditioning(streams, num_pictures)


@pytest.mark.parametrize("sampler", ["heun", "dpm++2m", "deis"])
def test_a_place_in_the_grid_is_a_seed(sampler):
    """Picture i has the noise of seed + i, however the grid is shared out among ranks."""
    config = GridConfig(num_pictures=5, seed=40, sampler=sampler, num_steps=4, batch_pictures=2)
    conditioning = conditioning_of(5)
    whole = draw_pictures(coloured, config, range(5), conditioning, SHAPE, torch.device("cpu"))
    expected = draw(coloured, conditioning, seeds=range(40, 45), shape_CHW=SHAPE, config=config)
    assert torch.equal(whole, to_uint8(expected))
    rows = torch.tensor([1, 4])
    part = draw_pictures(
        coloured, config, [1, 4], conditioning.select(rows), SHAPE, torch.device("cpu")
    )
    assert torch.equal(part, whole[rows])


def test_dropped_streams_are_zeros():
    """A stream that is not given to the model counts for nothing, the others as before."""
    config = GridConfig(num_steps=4, dropped_streams=("image",))
    found = draw_pictures(
        coloured, config, range(3), conditioning_of(3), SHAPE, torch.device("cpu")
    )
    text = Conditioning({"text": conditioning_of(3).streams["text"]}, 3)
    expected = draw(coloured, text, seeds=range(3), shape_CHW=SHAPE, config=config)
    assert torch.equal(found, to_uint8(expected))
