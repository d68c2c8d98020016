"""The U-Net: shapes, invariances to how conditioning is laid out, gradients, configuration.

Shapes: B batch, C channels, H W picture, T tokens, D width.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ediffi.conditioning import Conditioning, Stream, StreamConfig
from ediffi.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    image_px=16,
    patch_px=2,
    widths=(8, 16),
    num_blocks=1,
    self_attention_px=(4,),
    cross_attention_px=(8, 4),
    head_width=8,
    context_width=12,
    embedding_width=16,
    streams=(
        StreamConfig(name="t5", token_width=6),
        StreamConfig(name="clip_text", token_width=5, pooled_width=4),
        StreamConfig(name="clip_image", pooled_width=4, pooled_as_token=True),
    ),
)
BATCH_SIZE = 3


@pytest.fixture
def unet() -> UNet:
    """Return a seeded network whose last convolution no longer is zero."""
    torch.manual_seed(0)
    network = UNet(CONFIG)
    torch.nn.init.normal_(network.conv_out.weight)
    return network


def tokens(num_tokens: int, width: int) -> Stream:
    """Return real tokens for the whole batch."""
    mask_BT = torch.ones(BATCH_SIZE, num_tokens, dtype=torch.bool)
    return Stream(torch.randn(BATCH_SIZE, num_tokens, width), mask_BT)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Conditioning]:
    """Return seeded pictures, noise levels and conditioning."""
    torch.manual_seed(1)
    clip_text = tokens(4, 5)
    clip_text.pooled_BD = torch.randn(BATCH_SIZE, 4)
    streams = {
        "t5": tokens(7, 6),
        "clip_text": clip_text,
        "clip_image": Stream(pooled_BD=torch.randn(BATCH_SIZE, 4)),
    }
    conditioning = Conditioning(streams, BATCH_SIZE)
    return torch.randn(BATCH_SIZE, 3, 16, 16), torch.randn(BATCH_SIZE) / 4, conditioning


Inputs = tuple[Tensor, Tensor, Conditioning]


def with_t5(conditioning: Conditioning, change: Callable[[Stream], Stream]) -> Conditioning:
    """Return the conditioning with its T5 stream changed."""
    streams = conditioning.streams | {"t5": change(conditioning.streams["t5"])}
    return Conditioning(streams, conditioning.batch_size)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Assert equality up to the rounding of float32 sums taken in another order."""
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("patch_px", [1, 2, 4])
@pytest.mark.parametrize("widths", [(8,), (8, 16, 16)])
def test_the_output_has_the_shape_of_the_picture_and_starts_at_zero(
    patch_px: int, widths: tuple[int, ...]
) -> None:
    """F = 0 at initialisation, whatever the patch size and the number of levels."""
    config = UNetConfig(
        image_px=16, image_channels=2, patch_px=patch_px, widths=widths, num_blocks=2
    )
    x_BCHW = torch.randn(2, 2, 16, 16)
    f_BCHW = UNet(config)(x_BCHW, torch.zeros(2), Conditioning({}, 2))
    assert torch.equal(f_BCHW, torch.zeros_like(x_BCHW))


def test_gradient_reaches_every_parameter(unet: UNet, inputs: Inputs) -> None:
    """No parameter is idle once the last convolution has left zero."""
    unet(*inputs).square().mean().backward()
    idle = [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_gradient_checkpointing_changes_no_bit(inputs: Inputs) -> None:
    """Output and gradients are equal whether activations are kept or computed again."""
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        network = UNet(CONFIG)
        torch.nn.init.normal_(network.conv_out.weight)
        network.gradient_checkpointing = recompute
        f_BCHW = network(*inputs)
        f_BCHW.square().mean().backward()
        results.append([f_BCHW, *(p.grad for p in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_checkpointing_keeps_less(unet: UNet, inputs: Inputs) -> None:
    """Fewer bytes are saved for the way back."""
    saved_bytes = []
    for recompute in (False, True):
        unet.gradient_checkpointing = recompute
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            unet(*inputs)
        saved_bytes.append(sum(sizes))
    assert saved_bytes[1] < 0.5 * saved_bytes[0]


@pytest.mark.parametrize("name", ["t5", "clip_text", "clip_image"])
def test_every_stream_matters(unet: UNet, inputs: Inputs, name: str) -> None:
    """Dropping any one stream changes the output."""
    x_BCHW, c_noise_B, conditioning = inputs
    dropped = conditioning.drop({name: torch.zeros(BATCH_SIZE, dtype=torch.bool)})
    difference = unet(x_BCHW, c_noise_B, dropped) - unet(*inputs)
    assert difference.abs().max() > 1e-3


def test_the_noise_level_matters(unet: UNet, inputs: Inputs) -> None:
    """The same picture at another noise level gives another F."""
    x_BCHW, c_noise_B, conditioning = inputs
    difference = unet(x_BCHW, c_noise_B + 0.1, conditioning) - unet(*inputs)
    assert difference.abs().max() > 1e-3


def test_the_order_of_context_tokens_is_irrelevant(unet: UNet, inputs: Inputs) -> None:
    """Cross-attention sees a set: word order is the encoder's business."""
    x_BCHW, c_noise_B, conditioning = inputs
    order = torch.randperm(7)
    permuted = with_t5(conditioning, lambda t5: t5.map(lambda part: part[:, order]))
    assert_same(unet(x_BCHW, c_noise_B, permuted), unet(*inputs))


@pytest.mark.parametrize("num_tokens", [8, 40])
def test_masked_tokens_change_nothing(unet: UNet, inputs: Inputs, num_tokens: int) -> None:
    """Padding is invisible, however long and whatever it holds."""
    x_BCHW, c_noise_B, conditioning = inputs

    def pad_with_garbage(t5: Stream) -> Stream:
        padded = t5.pad(num_tokens)
        assert padded.tokens_BTD is not None
        padded.tokens_BTD[:, 7:] = 100 * torch.randn(BATCH_SIZE, num_tokens - 7, 6)
        return padded

    padded = with_t5(conditioning, pad_with_garbage)
    assert_same(unet(x_BCHW, c_noise_B, padded), unet(*inputs))


@pytest.mark.parametrize("num_tokens", [0, 1, 40])
def test_a_dropped_stream_forgets_its_length(unet: UNet, inputs: Inputs, num_tokens: int) -> None:
    """The unconditional output is one and the same after every prompt."""
    x_BCHW, c_noise_B, conditioning = inputs
    other = with_t5(conditioning, lambda _: tokens(num_tokens, 6)).null()
    assert_same(unet(x_BCHW, c_noise_B, other), unet(x_BCHW, c_noise_B, conditioning.null()))


def test_samples_of_a_batch_are_independent(unet: UNet, inputs: Inputs) -> None:
    """Each picture alone gives what it gives among others."""
    x_BCHW, c_noise_B, conditioning = inputs
    alone = [
        unet(x_BCHW[i : i + 1], c_noise_B[i : i + 1], conditioning.select(torch.tensor([i])))
        for i in range(BATCH_SIZE)
    ]
    assert_same(torch.cat(alone), unet(*inputs))


def test_bf16_autocast_agrees_with_float32(unet: UNet, inputs: Inputs) -> None:
    """Half precision costs a few per cent of the output's spread, not its meaning."""
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        half = unet(*inputs).float()
    full = unet(*inputs)
    assert (half - full).std() < 0.05 * full.std()


def test_weights_are_contiguous(unet: UNet) -> None:
    """Snapshots and flat optimizer buffers take weights as they are."""
    assert all(parameter.is_contiguous() for parameter in unet.parameters())


def test_the_papers_base_can_be_expressed() -> None:
    """At context and embedding width 1024 it has 715 M parameters; the paper's implies about 1 B.

    The paper's widths of context and embedding are not known to us.
    """
    config = UNetConfig(
        image_px=64,
        widths=(256, 512, 1024, 1024),
        num_blocks=3,
        self_attention_px=(32, 16, 8),
        cross_attention_px=(32, 16, 8),
        head_width=64,
        context_width=1024,
        embedding_width=1024,
        streams=(
            StreamConfig(name="t5", token_width=4096, dropout=0.25),
            StreamConfig(name="clip_text", token_width=768, pooled_width=768, dropout=0.2),
            StreamConfig(name="clip_image", pooled_width=768, pooled_as_token=True, dropout=0.9),
        ),
    )
    with torch.device("meta"):
        base = UNet(config)
    assert 0.6e9 < base.num_parameters < 1.2e9


def test_num_parameters_counts_the_whole_network() -> None:
    """Every stored weight is counted once."""
    network = UNet(CONFIG)
    assert network.num_parameters == sum(w.numel() for w in network.state_dict().values())


def test_the_config_survives_json() -> None:
    """Writing and reading gives an equal config, streams and tuples included."""
    assert UNetConfig.from_json(json.loads(json.dumps(CONFIG.to_json()))) == CONFIG


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_px": 18}, r"patch_px \* 2\^\(levels - 1\) = 4, got 18"),
        ({"self_attention_px": (16, 4)}, "self_attention_px must list.*8, 4; got 16"),
        ({"cross_attention_px": (2,)}, "cross_attention_px must list.*8, 4; got 2"),
        ({"head_width": 12}, "head_width must divide.*got 12 and width 8 at 8 px"),
        ({"widths": ()}, "widths must be"),
        ({"widths": (8, 18)}, "multiples of 4"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"cross_attention_px": ()}, "t5, clip_text, clip_image have tokens but nothing attends"),
        ({"streams": ()}, "no stream has tokens"),
        ({"streams": CONFIG.streams * 2}, "distinct names"),
    ],
)
def test_the_config_explains_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    """Each bad field is named with what was required and what was found."""
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_an_unknown_json_field_is_refused() -> None:
    """A misspelt field is named, with the fields there are."""
    with pytest.raises(ValueError, match=r"no field width; .*widths"):
        UNetConfig.from_json({"image_px": 8, "width": [8]})
