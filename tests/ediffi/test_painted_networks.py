"""Painting inside both families of networks: every layer, every stream, guidance, precision.

Shapes: B batch, C channels, H W picture or painting, T tokens, D width.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ediffi.attention import Context
from ediffi.conditioning import Conditioning, Stream, StreamConfig
from ediffi.efficient_unet import EfficientUNetConfig
from ediffi.guidance import guided
from ediffi.layers import CrossAttention
from ediffi.network import NetworkConfig, build_network
from ediffi.preconditioning import Denoiser, Preconditioning
from ediffi.unet import UNetConfig

STREAMS = (
    StreamConfig(name="t5", token_width=6),
    StreamConfig(name="clip_text", token_width=5, pooled_width=4),
    StreamConfig(name="clip_image", pooled_width=4, pooled_as_token=True),
)
ADM = UNetConfig(
    image_px=16,
    patch_px=2,
    widths=(8, 16),
    num_blocks=1,
    cross_attention_px=(8, 4),
    head_width=8,
    context_width=12,
    embedding_width=16,
    streams=STREAMS,
)
EFFICIENT = EfficientUNetConfig(
    image_px=16,
    low_res_factor=2,
    widths=(8, 16),
    num_blocks=(1, 1),
    cross_attention_px=(8, 4),
    head_width=8,
    context_width=12,
    embedding_width=16,
    streams=STREAMS,
)
LEFT = slice(0, 5)  # columns of a painting 10 wide
SIGMA_B = torch.tensor([5.0, 0.5])


def make_denoiser(config: NetworkConfig) -> Denoiser:
    """Return a seeded denoiser whose network answers with something."""
    torch.manual_seed(0)
    network = build_network(config)
    torch.nn.init.normal_(network.conv_out.weight)
    return Denoiser(network, Preconditioning()).eval()


def make_inputs() -> tuple[Tensor, Conditioning]:
    """Return two noisy pictures and their unpainted conditioning, the second of fewer tokens."""
    torch.manual_seed(1)
    mask_BT = torch.tensor([[True] * 4, [True, True, False, False]])
    streams = {
        "t5": Stream(torch.randn(2, 4, 6), mask_BT),
        "clip_text": Stream(torch.randn(2, 3, 5), mask_BT[:, :3], torch.randn(2, 4)),
        "clip_image": Stream(pooled_BD=torch.randn(2, 4)),
    }
    low_res_BCHW = torch.rand(2, 3, 8, 8) * 2 - 1
    return torch.randn(2, 3, 16, 16), Conditioning(streams, 2, low_res_BCHW)


def painted(conditioning: Conditioning, weight: float, *names: str) -> Conditioning:
    """Paint the second token of each named stream on the left half, with w' = `weight`."""
    streams = dict(conditioning.streams)
    for name in names or ("t5", "clip_text"):
        stream = streams[name]
        assert stream.tokens_BTD is not None
        paint_BTHW = torch.zeros(*stream.tokens_BTD.shape[:2], 6, 10)
        paint_BTHW[:, 1, :, LEFT] = weight
        streams[name] = Stream(stream.tokens_BTD, stream.mask_BT, stream.pooled_BD, paint_BTHW)
    return Conditioning(streams, conditioning.batch_size, conditioning.low_res_BCHW)


families = pytest.mark.parametrize("config", [ADM, EFFICIENT], ids=["adm", "efficient"])


@families
def test_every_cross_attention_layer_is_painted(config: NetworkConfig) -> None:
    """Painted strongly, the two tokens take all attention of the left, in every layer."""
    denoiser, (x_BCHW, conditioning) = make_denoiser(config), make_inputs()
    seen: list[Tensor] = []

    def look(layer: torch.nn.Module, inputs: tuple[Tensor, Context], _: Tensor) -> None:
        assert isinstance(layer, CrossAttention)
        x_BCHW, context = inputs
        seen.append(layer.weights(x_BCHW, context).unflatten(2, x_BCHW.shape[2:]))

    layers = [module for module in denoiser.modules() if isinstance(module, CrossAttention)]
    for layer in layers:
        layer.register_forward_hook(look)
    with torch.no_grad():
        denoiser(x_BCHW, SIGMA_B, painted(conditioning, 1e4))
    assert {one.shape[3] for one in seen} == {4, 8}
    assert len(seen) == len(layers)
    for weights_BNHWT in seen:
        own_BNHW = weights_BNHWT[..., 1] + weights_BNHWT[..., 4 + 1]
        half_px = weights_BNHWT.shape[3] // 2
        assert own_BNHW[..., : half_px - 1].min() > 0.99
        assert own_BNHW[..., half_px + 1 :].max() < 0.9


@families
@pytest.mark.parametrize("name", ["t5", "clip_text"])
def test_either_text_stream_can_be_painted(config: NetworkConfig, name: str) -> None:
    """Columns of one stream alone change the estimate, and not as the other's do."""
    denoiser, (x_BCHW, conditioning) = make_denoiser(config), make_inputs()
    with torch.no_grad():
        plain = denoiser(x_BCHW, SIGMA_B, conditioning)
        one = denoiser(x_BCHW, SIGMA_B, painted(conditioning, 2.0, name))
        both = denoiser(x_BCHW, SIGMA_B, painted(conditioning, 2.0))
    assert (one - plain).abs().max() > 1e-3
    assert (both - one).abs().max() > 1e-3


@families
def test_blank_paint_gives_the_unpainted_estimate(config: NetworkConfig) -> None:
    """Weight 0 differs from no painting only by the kernel's rounding."""
    denoiser, (x_BCHW, conditioning) = make_denoiser(config), make_inputs()
    with torch.no_grad():
        found = denoiser(x_BCHW, SIGMA_B, painted(conditioning, 0.0))
        expected = denoiser(x_BCHW, SIGMA_B, conditioning)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@families
def test_the_null_branch_of_guidance_is_not_painted(config: NetworkConfig) -> None:
    """At scale 0 a painting changes nothing; at scale 2 it does."""
    denoiser, (x_BCHW, conditioning) = make_denoiser(config), make_inputs()
    with torch.no_grad():
        null = denoiser(x_BCHW, SIGMA_B, conditioning.null())
        found = guided(denoiser, 0.0)(x_BCHW, SIGMA_B, painted(conditioning, 3.0))
        torch.testing.assert_close(found, null, atol=2e-5, rtol=1e-5)
        conditional = denoiser(x_BCHW, SIGMA_B, painted(conditioning, 3.0))
        doubled = guided(denoiser, 2.0)(x_BCHW, SIGMA_B, painted(conditioning, 3.0))
    torch.testing.assert_close(doubled, null + 2 * (conditional - null), atol=1e-4, rtol=1e-4)


@families
def test_painted_samples_of_a_batch_are_independent(config: NetworkConfig) -> None:
    """Each picture alone is painted as it is among others, though the other's scores are larger."""
    denoiser, (x_BCHW, conditioning) = make_denoiser(config), make_inputs()
    tokens_BTD = conditioning.streams["t5"].tokens_BTD
    assert tokens_BTD is not None
    tokens_BTD[1] *= 10
    both = painted(conditioning, 2.0)
    with torch.no_grad():
        together = denoiser(x_BCHW, SIGMA_B, both)
        for i in range(2):
            chosen = torch.tensor([i])
            alone = denoiser(x_BCHW[chosen], SIGMA_B[chosen], both.select(chosen))
            torch.testing.assert_close(together[chosen], alone, atol=2e-5, rtol=1e-5)


@families
def test_paint_lies_as_the_picture_does(config: NetworkConfig) -> None:
    """Left stays left, height does not matter where it did not, and high noise weighs more."""
    denoiser, (x_BCHW, conditioning) = make_denoiser(config), make_inputs()
    seen: list[Tensor] = []

    def look(layer: torch.nn.Module, inputs: tuple[Tensor, Context], _: Tensor) -> None:
        x_BCHW, context = inputs
        hook = context.score_hook(x_BCHW)
        assert hook is not None
        ones = torch.ones(2, 1, x_BCHW.shape[2] * x_BCHW.shape[3], context.mask_BT.shape[1])
        seen.append(hook(ones)[:, 0, :, 1].unflatten(1, x_BCHW.shape[2:]))

    for module in denoiser.modules():
        if isinstance(module, CrossAttention):
            module.register_forward_hook(look)
    with torch.no_grad():
        denoiser(x_BCHW, SIGMA_B, painted(conditioning, 1.0))
    for bias_BHW in seen:
        assert (bias_BHW[:, :, 0] > bias_BHW[:, :, -1]).all()
        torch.testing.assert_close(bias_BHW, bias_BHW.flip(1))  # nothing varies with height
        assert (bias_BHW[0] >= bias_BHW[1]).all()  # sigma 5 weighs more than 0.5


@families
def test_painting_works_under_autocast(config: NetworkConfig) -> None:
    """bf16 costs a few per cent of the output's spread; the estimate stays float32."""
    denoiser, (x_BCHW, conditioning) = make_denoiser(config), make_inputs()
    both = painted(conditioning, 2.0)
    with torch.no_grad():
        full = denoiser(x_BCHW, SIGMA_B, both)
        with torch.autocast("cpu", torch.bfloat16):
            half = denoiser(x_BCHW, SIGMA_B, both)
    assert half.dtype == torch.float32
    assert (half - full).std() < 0.05 * full.std()


@families
def test_gradient_checkpointing_changes_no_bit_of_a_painted_pass(config: NetworkConfig) -> None:
    """Output and gradients are equal whether activations are kept or computed again."""

    def results(recompute: bool) -> list[Tensor]:
        denoiser, (x_BCHW, conditioning) = make_denoiser(config), make_inputs()
        denoiser.network.gradient_checkpointing = recompute
        estimate = denoiser(x_BCHW, SIGMA_B, painted(conditioning, 2.0))
        estimate.square().mean().backward()
        return [estimate, *(p.grad for p in denoiser.parameters() if p.grad is not None)]

    kept, again = results(False), results(True)
    assert len(kept) == len(again) > 10
    assert all(torch.equal(a, b) for a, b in zip(kept, again))


@families
def test_weights_have_the_names_they_always_had(config: NetworkConfig) -> None:
    """Painting needs no parameter: cross-attention has its norm, q, kv and out alone."""
    names = {
        name.partition("cross_attention.")[2]
        for name in make_denoiser(config).state_dict()
        if "cross_attention." in name
    }
    assert names == {"norm.weight", "norm.bias", "q.weight", "kv.weight", "out.weight", "out.bias"}


def test_layers_of_one_resolution_share_the_resized_planes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A call resizes once a resolution, however many layers there are."""
    import ediffi.attention

    sizes: list[tuple[int, int]] = []
    resize: Callable[[Tensor, tuple[int, int]], Tensor] = ediffi.attention.resize_paint

    def counted(paint_BTHW: Tensor, size: tuple[int, int]) -> Tensor:
        sizes.append(size)
        return resize(paint_BTHW, size)

    denoiser, (x_BCHW, conditioning) = make_denoiser(ADM), make_inputs()
    monkeypatch.setattr(ediffi.attention, "resize_paint", counted)
    with torch.no_grad():
        denoiser(x_BCHW, SIGMA_B, painted(conditioning, 1.0))
    assert sorted(sizes) == [(4, 4), (6, 10), (6, 10), (8, 8)]
