"""Attention by stream and by token, for base, ensemble and both families of networks.

Shapes: B batch, H W picture or map, T tokens.
"""

import pytest
import torch
from torch import Tensor, nn

from ediffi.attention_maps import attention_by_stream, token_maps
from ediffi.conditioning import Conditioning, Stream, StreamConfig
from ediffi.efficient_unet import EfficientUNetConfig
from ediffi.guidance import guided
from ediffi.layers import CrossAttention
from ediffi.network import NetworkConfig, build_network
from ediffi.preconditioning import Denoiser, Preconditioning
from ediffi.unet import UNetConfig

STREAMS = (
    StreamConfig(name="t5", token_width=6),
    StreamConfig(name="clip_text", token_width=5, pooled_width=4, pooled_as_token=True),
    StreamConfig(name="clip_image", pooled_width=4, pooled_as_token=True),
)
SIZES = {"head_width": 8, "context_width": 12, "embedding_width": 16}
ADM = UNetConfig(
    image_px=16,
    patch_px=2,
    widths=(8, 16),
    num_blocks=1,
    cross_attention_px=(8, 4),
    streams=STREAMS,
    **SIZES,
)
EFFICIENT = EfficientUNetConfig(
    image_px=16,
    low_res_factor=2,
    widths=(8, 16),
    num_blocks=(1, 1),
    cross_attention_px=(8, 4),
    streams=STREAMS,
    **SIZES,
)
NAMES = ["t5", "clip_text", "clip_image", "null"]
SIGMA_B = torch.tensor([5.0, 0.5, 5.0])

families = pytest.mark.parametrize("config", [ADM, EFFICIENT], ids=["adm", "efficient"])


def make_denoiser(config: NetworkConfig = ADM) -> Denoiser:
    """Return a seeded denoiser."""
    torch.manual_seed(0)
    return Denoiser(build_network(config), Preconditioning()).eval()


def make_inputs() -> tuple[Tensor, Tensor, Conditioning]:
    """Return three noisy pictures, noise levels and conditioning of 4, 2 and 4 T5 tokens."""
    torch.manual_seed(1)
    mask_BT = torch.tensor([[True] * 4, [True, True, False, False], [True] * 4])
    streams = {
        "t5": Stream(torch.randn(3, 4, 6), mask_BT),
        "clip_text": Stream(torch.randn(3, 2, 5), mask_BT[:, :2], torch.randn(3, 4)),
        "clip_image": Stream(pooled_BD=torch.randn(3, 4)),
    }
    conditioning = Conditioning(streams, 3, torch.rand(3, 3, 8, 8) * 2 - 1)
    return torch.randn(3, 3, 16, 16), SIGMA_B, conditioning


@families
def test_shares_sum_to_one(config: NetworkConfig) -> None:
    """Every stream and the null token have a share between 0 and 1, of each picture."""
    shares = attention_by_stream(make_denoiser(config), *make_inputs())
    assert list(shares) == NAMES
    torch.testing.assert_close(sum(shares.values()), torch.ones(3))
    assert all(((share_B > 0) & (share_B < 1)).all() for share_B in shares.values())


def test_indifferent_attention_gives_every_token_the_same() -> None:
    """With queries of zero, shares are numbers of real tokens."""
    denoiser = make_denoiser()
    for module in denoiser.modules():
        if isinstance(module, CrossAttention):
            nn.init.zeros_(module.q.weight)
    shares = attention_by_stream(denoiser, *make_inputs())
    for index, num_t5 in enumerate((4, 2, 4)):
        found = [shares[name][index].item() for name in NAMES]
        counts = [num_t5, 3, 1, 1]  # CLIP text has two tokens and its pooled vector
        assert found == pytest.approx([count / sum(counts) for count in counts])


def test_shares_are_means_over_the_layers_weights() -> None:
    """Equal to the weights of each layer, collected by hand and averaged layer by layer."""
    denoiser, (x_BCHW, sigma_B, conditioning) = make_denoiser(), make_inputs()
    by_layer: list[Tensor] = []

    def look(layer: CrossAttention, inputs: tuple[Tensor, object], _: Tensor) -> None:
        by_layer.append(layer.weights(*inputs)[..., 7].mean((1, 2)))  # the clip_image token

    handles = [
        module.register_forward_hook(look)
        for module in denoiser.modules()
        if isinstance(module, CrossAttention)
    ]
    with torch.no_grad():
        denoiser(x_BCHW, sigma_B, conditioning)
    for handle in handles:
        handle.remove()
    shares = attention_by_stream(denoiser, x_BCHW, sigma_B, conditioning)
    assert len(by_layer) == len(handles) == 7
    torch.testing.assert_close(shares["clip_image"], torch.stack(by_layer).mean(0))


def test_a_dropped_stream_gets_nothing() -> None:
    """Text that is masked has no share; a dropped pooled vector stays a token, as in training."""
    x_BCHW, sigma_B, conditioning = make_inputs()
    shares = attention_by_stream(make_denoiser(), x_BCHW, sigma_B, conditioning.null())
    assert shares["t5"].tolist() == [0, 0, 0]
    assert (shares["clip_image"] > 0).all()
    torch.testing.assert_close(sum(shares.values()), torch.ones(3))


def test_streams_are_those_of_the_network() -> None:
    """Another encoder is measured like any other, and absent ones are not in the way."""
    streams = (StreamConfig(name="other", token_width=3),)
    config = UNetConfig(image_px=8, widths=(8,), cross_attention_px=(8,), streams=streams, **SIZES)
    mask_BT = torch.ones(1, 2, dtype=torch.bool)
    conditioning = Conditioning({"other": Stream(torch.randn(1, 2, 3), mask_BT)}, 1)
    shares = attention_by_stream(
        make_denoiser(config), torch.randn(1, 3, 8, 8), torch.ones(1), conditioning
    )
    assert list(shares) == ["other", "null"]


def test_measuring_changes_nothing_and_leaves_nothing() -> None:
    """The estimate is the same bit for bit before and after, and no hook is left behind."""
    denoiser, inputs = make_denoiser(), make_inputs()
    nn.init.normal_(denoiser.network.conv_out.weight)
    hooks = nn.modules.module._global_forward_hooks
    with torch.no_grad():
        before = denoiser(*inputs)
        attention_by_stream(denoiser, *inputs)
        assert torch.equal(denoiser(*inputs), before)
    assert not hooks
    with pytest.raises(ValueError, match="the streams t5"):
        attention_by_stream(denoiser, *inputs[:2], Conditioning({}, 3))
    assert not hooks


def test_samples_routed_to_experts_keep_their_places() -> None:
    """Mixed noise levels go to two experts; each picture's shares are those of its own."""
    low, high = make_denoiser(), make_denoiser()
    for module in high.modules():
        if isinstance(module, CrossAttention):
            nn.init.zeros_(module.q.weight)

    def routed(x_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        output_BCHW = torch.empty_like(x_BCHW)
        for expert, own_B in ((low, sigma_B < 1), (high, sigma_B >= 1)):
            if own_B.any():
                output_BCHW[own_B] = expert(
                    x_BCHW[own_B], sigma_B[own_B], conditioning.select(own_B)
                )
        return output_BCHW

    inputs = make_inputs()
    found = attention_by_stream(routed, *inputs)["t5"]
    of_low, of_high = (attention_by_stream(one, *inputs)["t5"] for one in (low, high))
    torch.testing.assert_close(found, torch.where(SIGMA_B < 1, of_low, of_high))


@families
def test_maps_show_a_painted_token_where_it_is_painted(config: NetworkConfig) -> None:
    """A strongly painted token is looked at from its half of the picture, at the picture's size."""
    x_BCHW, sigma_B, conditioning = make_inputs()
    t5 = conditioning.streams["t5"]
    t5.paint_BTHW = torch.zeros(3, 4, 8, 8)
    t5.paint_BTHW[:, 1, :, :4] = 1e4
    maps_BTHW = token_maps(make_denoiser(config), x_BCHW, sigma_B, conditioning, stream="t5")
    assert maps_BTHW.shape == (3, 4, 16, 16)
    assert maps_BTHW[:, 1, :, :4].min() > 0.99
    assert maps_BTHW[:, 1, :, 12:].max() < 0.9
    assert not maps_BTHW[1, 2:].any()  # padding


def test_maps_of_all_streams_sum_to_one_at_every_pixel() -> None:
    """A pooled vector that serves as token is the last map of its stream."""
    denoiser, inputs = make_denoiser(), make_inputs()
    maps = {name: token_maps(denoiser, *inputs, stream=name) for name in NAMES}
    assert [maps[name].shape[1] for name in NAMES] == [4, 3, 1, 1]
    torch.testing.assert_close(torch.cat(list(maps.values()), dim=1).sum(1), torch.ones(3, 16, 16))
    shares = attention_by_stream(denoiser, *inputs)
    torch.testing.assert_close(maps["null"].mean((1, 2, 3)), shares["null"], atol=0.01, rtol=0.1)


def test_what_cannot_be_measured_is_told() -> None:
    """Another stream, no cross-attention, guidance, no picture."""
    denoiser, (x_BCHW, sigma_B, conditioning) = make_denoiser(), make_inputs()
    with pytest.raises(ValueError, match="t5, clip_text, clip_image, null; got 't6'"):
        token_maps(denoiser, x_BCHW, sigma_B, conditioning, stream="t6")
    with pytest.raises(
        ValueError, match=r"batches of \[2\]; measure the denoiser without guidance"
    ):
        attention_by_stream(guided(denoiser, 2.0), x_BCHW, sigma_B, conditioning)
    blind = make_denoiser(UNetConfig(image_px=16, widths=(8,)))
    with pytest.raises(ValueError, match="no layer at all"):
        attention_by_stream(blind, x_BCHW, sigma_B, conditioning)
    nobody = torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match="at least one picture"):
        attention_by_stream(denoiser, x_BCHW[:0], sigma_B[:0], conditioning.select(nobody))
