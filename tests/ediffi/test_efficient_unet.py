"""The Efficient U-Net: shapes, its low-resolution input, bigger pictures, the paper's sizes.

Shapes: B batch, C channels, H W picture, h w low-resolution picture.
"""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ediffi.conditioning import Conditioning, Stream, StreamConfig
from ediffi.efficient_unet import EfficientUNet, EfficientUNetConfig
from ediffi.guidance import guided
from ediffi.preconditioning import Denoiser, Preconditioning

CONFIG = EfficientUNetConfig(
    image_px=32,
    widths=(8, 16),
    num_blocks=(1, 2),
    self_attention_px=(8,),
    cross_attention_px=(8,),
    head_width=8,
    context_width=12,
    embedding_width=16,
    streams=(
        StreamConfig(name="t5", token_width=6),
        StreamConfig(name="clip", pooled_width=4, pooled_as_token=True),
    ),
)
PAPER_STREAMS = (
    StreamConfig(name="t5", token_width=4096, dropout=0.25),
    StreamConfig(name="clip_text", token_width=768, pooled_width=768, dropout=0.2),
    StreamConfig(name="clip_image", pooled_width=768, pooled_as_token=True, dropout=0.9),
)
BATCH_SIZE = 2

Inputs = tuple[Tensor, Tensor, Conditioning]


def make_network(config: EfficientUNetConfig = CONFIG) -> EfficientUNet:
    """Return a seeded network whose last convolution no longer is zero."""
    torch.manual_seed(0)
    network = EfficientUNet(config)
    torch.nn.init.normal_(network.conv_out.weight)
    return network


def make_inputs(image_px: int = 32, low_res_px: int = 8) -> Inputs:
    """Return seeded pictures, noise levels and conditioning."""
    torch.manual_seed(1)
    mask_BT = torch.ones(BATCH_SIZE, 5, dtype=torch.bool)
    streams = {
        "t5": Stream(torch.randn(BATCH_SIZE, 5, 6), mask_BT),
        "clip": Stream(pooled_BD=torch.randn(BATCH_SIZE, 4)),
    }
    low_res_BCHW = torch.rand(BATCH_SIZE, 3, low_res_px, low_res_px) * 2 - 1
    conditioning = Conditioning(streams, BATCH_SIZE, low_res_BCHW)
    x_BCHW = torch.randn(BATCH_SIZE, 3, image_px, image_px)
    return x_BCHW, torch.randn(BATCH_SIZE) / 4, conditioning


@pytest.mark.parametrize("enlarging", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("factor", "low_res_px"), [(2, 16), (4, 8)])
def test_the_output_has_the_shape_of_the_picture_and_starts_at_zero(
    enlarging: Any, factor: int, low_res_px: int
) -> None:
    """F = 0 at initialisation, for every factor and way of enlarging."""
    network = EfficientUNet(replace(CONFIG, low_res_factor=factor, enlarging=enlarging))
    f_BCHW = network(*make_inputs(low_res_px=low_res_px))
    assert torch.equal(f_BCHW, torch.zeros(BATCH_SIZE, 3, 32, 32))


def test_gradient_reaches_every_parameter() -> None:
    """No parameter is idle once the last convolution has left zero."""
    network = make_network()
    network(*make_inputs()).square().mean().backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_gradient_checkpointing_changes_no_bit() -> None:
    """Output and gradients are equal whether activations are kept or computed again."""
    results = []
    for recompute in (False, True):
        network = make_network()
        network.gradient_checkpointing = recompute
        f_BCHW = network(*make_inputs())
        f_BCHW.square().mean().backward()
        results.append([f_BCHW, *(p.grad for p in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_low_resolution_picture_and_noise_level_matter() -> None:
    """Another low-resolution picture, or another noise level, gives another F."""
    network, (x_BCHW, c_noise_B, conditioning) = make_network(), make_inputs()
    f_BCHW = network(x_BCHW, c_noise_B, conditioning)
    other = replace(conditioning, low_res_BCHW=torch.zeros(BATCH_SIZE, 3, 8, 8))
    assert (network(x_BCHW, c_noise_B, other) - f_BCHW).abs().max() > 1e-3
    assert (network(x_BCHW, c_noise_B + 0.1, conditioning) - f_BCHW).abs().max() > 1e-3


def test_guidance_keeps_the_low_resolution_picture_in_both_branches() -> None:
    """The unconditional branch drops captions alone: its F is that of dropped streams."""
    denoiser = Denoiser(make_network(), Preconditioning()).eval()
    x_BCHW, _, conditioning = make_inputs()
    sigma_B = torch.full((BATCH_SIZE,), 0.7)
    nothing = {name: torch.zeros(BATCH_SIZE, dtype=torch.bool) for name in conditioning.streams}
    expected = denoiser(x_BCHW, sigma_B, conditioning.drop(nothing))
    with torch.no_grad():
        found = guided(denoiser, 0.0)(x_BCHW, sigma_B, conditioning)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_without_self_attention_bigger_pictures_are_accepted() -> None:
    """Trained on 32 px, run on 64 px: far from the border each quarter is what it is alone."""
    network = make_network(
        EfficientUNetConfig(image_px=32, widths=(8,), num_blocks=(1,), embedding_width=16)
    )
    # GroupNorm sees the whole picture: without it, the network is a plain local filter.
    for module in network.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x  # type: ignore[method-assign]
    torch.manual_seed(2)
    x_BCHW, low_BCHW = torch.randn(1, 3, 64, 64), torch.rand(1, 3, 16, 16)
    c_noise_B = torch.zeros(1)
    whole = network(x_BCHW, c_noise_B, Conditioning({}, 1, low_BCHW))
    patch_low = Conditioning({}, 1, low_BCHW[..., :8, :8])
    patch = network(x_BCHW[..., :32, :32], c_noise_B, patch_low)
    assert whole.shape == (1, 3, 64, 64)
    torch.testing.assert_close(whole[..., :8, :8], patch[..., :8, :8], atol=1e-4, rtol=1e-4)


def test_a_bigger_picture_with_attention_runs_too() -> None:
    """Cross-attention looks from pixel to pixel: it does not mind the size."""
    network = make_network(replace(CONFIG, self_attention_px=()))
    assert network(*make_inputs(image_px=64, low_res_px=16)).shape == (BATCH_SIZE, 3, 64, 64)


def test_a_missing_low_resolution_picture_is_explained() -> None:
    """Without its input the network says what it needs, with the shape."""
    x_BCHW, c_noise_B, conditioning = make_inputs()
    lacking = Conditioning(conditioning.streams, BATCH_SIZE)
    with pytest.raises(ValueError, match=r"low_res_BCHW must be .*\(B, 3, 8, 8\)"):
        make_network()(x_BCHW, c_noise_B, lacking)


@pytest.mark.parametrize(("image_px", "low_res_px"), [(32, 16), (36, 9), (34, 8)])
def test_sizes_that_do_not_fit_are_refused(image_px: int, low_res_px: int) -> None:
    """Another factor, or sides that the levels cannot halve, are named."""
    with pytest.raises(ValueError, match=rf"4 times the sides .* got \({image_px}, {image_px}\)"):
        make_network(replace(CONFIG, widths=(8, 8, 8), num_blocks=(1, 1, 1)))(
            *make_inputs(image_px=image_px, low_res_px=low_res_px)
        )


def test_bf16_autocast_agrees_with_float32() -> None:
    """Half precision costs a few per cent of the output's spread, not its meaning."""
    network, inputs = make_network(), make_inputs()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        half = network(*inputs).float()
    full = network(*inputs)
    assert (half - full).std() < 0.05 * full.std()


@pytest.mark.parametrize(
    ("widths", "self_attention_px", "expected"),
    [((128, 256, 512, 1024), (32,), 456_417_411), ((128, 256, 512, 512), (), 207_590_019)],
)
def test_the_papers_super_resolution_networks_can_be_expressed(
    widths: tuple[int, ...], self_attention_px: tuple[int, ...], expected: int
) -> None:
    """SR256 has 456 M parameters and SR1024 208 M, where the paper's totals imply 0.3 B and 0.4 B.

    Its tables round to 0.1 B; together ours are 0.66 B against 0.7 B. "2 residual blocks, block
    multipliers 1, 2, 4, 4" is read as 2, 4, 8, 8 blocks, the numbers Imagen published.
    """
    config = EfficientUNetConfig(
        image_px=256,
        widths=widths,
        num_blocks=(2, 4, 8, 8),
        self_attention_px=self_attention_px,
        cross_attention_px=(32,),
        head_width=64,
        context_width=512,
        embedding_width=512,
        streams=PAPER_STREAMS,
    )
    with torch.device("meta"):
        network = EfficientUNet(config)
    assert network.num_parameters == expected


def test_the_config_survives_json() -> None:
    """Writing and reading gives an equal config, streams and tuples included."""
    assert EfficientUNetConfig.from_json(json.loads(json.dumps(CONFIG.to_json()))) == CONFIG


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_px": 34}, r"divisible by 2\^levels = 4, got 34"),
        ({"low_res_factor": 3}, r"divisor of image_px \(32\) and at least 2, got 3"),
        ({"low_res_factor": 1}, "at least 2, got 1"),
        ({"num_blocks": (1,)}, r"2 positive numbers, one for each of widths, got \(1,\)"),
        ({"num_blocks": (0, 1)}, r"positive numbers.* got \(0, 1\)"),
        ({"enlarging": "nearest"}, "enlarging must be one of bilinear, bicubic, got 'nearest'"),
        ({"self_attention_px": (32,)}, "self_attention_px must list.*16, 8; got 32"),
        ({"head_width": 12}, "head_width must divide.*got 12 and width 16 at 8 px"),
        ({"widths": (8, 18)}, "multiples of 4"),
        ({"cross_attention_px": ()}, "t5, clip have tokens but nothing attends"),
    ],
)
def test_the_config_explains_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    """Each bad field is named with what was required and what was found."""
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)
