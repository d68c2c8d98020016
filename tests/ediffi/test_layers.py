"""Noise embedding, attention blocks and stream projections against closed forms.

Shapes: B batch, C channels, H W feature map, I queries, T tokens, D width, N heads.
"""

import math

import pytest
import torch
from torch import Tensor

from ediffi.attention import Context
from ediffi.conditioning import Conditioning, Stream, StreamConfig, collate
from ediffi.layers import (
    TOKEN_MULTIPLE,
    CrossAttention,
    ResidualBlock,
    SelfAttention,
    StreamProjections,
    fourier_features,
    group_norm,
    resample,
)

C_NOISE_B = torch.zeros(1)


def test_fourier_features_tell_neighbouring_noise_levels_apart() -> None:
    """Over the whole range of sigma features stay unit-length and a 5 % change is visible."""
    sigma_B = torch.logspace(math.log10(5e-4), math.log10(120.0), 254)  # steps of 5 %
    features = fourier_features(sigma_B.log() / 4, 32)
    assert features.shape == (254, 32)
    torch.testing.assert_close(features.square().sum(1), torch.full((254,), 16.0))
    distances = torch.cdist(features, features) + 100 * torch.eye(254)
    assert distances.min() > 0.3


def test_groups_never_hold_fewer_than_four_channels() -> None:
    """ADM's 32 groups for wide layers, four channels to a group for narrow ones."""
    assert [group_norm(width).num_groups for width in (1024, 128, 48, 4)] == [32, 32, 4, 1]


def test_attention_blocks_treat_pixels_as_a_set() -> None:
    """Without positions, moving the pixels moves the output in the same way."""
    x_BCHW = torch.randn(2, 8, 4, 4)
    context = Context(torch.randn(2, 3, 6), torch.ones(2, 3, dtype=torch.bool))
    cross_attention = CrossAttention(8, head_width=4, context_width=6)
    self_attention = SelfAttention(8, head_width=4)

    def both(x_BCHW: Tensor) -> Tensor:
        return cross_attention(self_attention(x_BCHW), context)

    moved = both(x_BCHW.roll((1, 2), (2, 3)).transpose(2, 3))
    expected = both(x_BCHW).roll((1, 2), (2, 3)).transpose(2, 3)
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-5)


def test_self_attention_equals_its_definition() -> None:
    """One head over the normalised pixels, projected and added to the input."""
    layer = SelfAttention(8, head_width=8)
    x_BCHW = torch.randn(2, 8, 2, 3)
    q, k, v = (part.flatten(2).mT[:, None] for part in layer.qkv(layer.norm(x_BCHW)).chunk(3, 1))
    weights = torch.softmax(torch.einsum("bnid,bntd->bnit", q, k) / math.sqrt(8), dim=-1)
    attended = torch.einsum("bnit,bntd->bnid", weights, v)[:, 0].mT.unflatten(2, (2, 3))
    torch.testing.assert_close(layer(x_BCHW), x_BCHW + layer.out(attended))


def test_resampling_down_undoes_resampling_up() -> None:
    """Averaging the four copies of each pixel gives it back."""
    x_BCHW = torch.randn(1, 2, 3, 3)
    assert resample(x_BCHW, "up").shape == (1, 2, 6, 6)
    torch.testing.assert_close(resample(resample(x_BCHW, "up"), "down"), x_BCHW)


def test_a_residual_block_is_its_skip_plus_a_scaled_and_shifted_branch() -> None:
    """With scale -1 the normalised features vanish and only the shift feeds the branch."""
    block = ResidualBlock(4, 8, 6)
    with torch.no_grad():
        block.scale_shift.weight.zero_()
        block.scale_shift.bias.copy_(torch.cat([-torch.ones(8), torch.arange(8.0)]))
    x_BCHW = torch.randn(2, 4, 5, 5)
    shift_BCHW = torch.arange(8.0).view(1, 8, 1, 1).expand(2, 8, 5, 5)
    expected = block.skip(x_BCHW) + block.conv_out(torch.nn.functional.silu(shift_BCHW))
    torch.testing.assert_close(block(x_BCHW, torch.randn(2, 6)), expected)


def projections() -> tuple[StreamProjections, Conditioning]:
    """Return the projections of three streams and a batch of one sample."""
    streams = (
        StreamConfig(name="t5", token_width=5),
        StreamConfig(name="clip_text", token_width=3, pooled_width=4),
        StreamConfig(name="clip_image", pooled_width=4, pooled_as_token=True),
    )
    sample = {
        "t5": {"tokens": torch.randn(2, 5)},
        "clip_text": {"tokens": torch.randn(3, 3), "pooled": torch.randn(4)},
        "clip_image": {"pooled": torch.randn(4)},
    }
    return StreamProjections(streams, context_width=6, embedding_width=7), collate(
        [sample], streams
    )


def test_the_context_holds_streams_in_order_then_the_null_token() -> None:
    """Two T5 tokens, three CLIP text tokens, the CLIP image, the null token, masked padding."""
    streams, conditioning = projections()
    context = streams.context(conditioning, C_NOISE_B)
    assert context.tokens_BTD.shape == (1, TOKEN_MULTIPLE, 6)
    assert context.mask_BT.tolist() == [[True] * 7 + [False] * (TOKEN_MULTIPLE - 7)]
    assert torch.equal(context.tokens_BTD[0, 6], streams.null_token_D)
    assert context.columns == (("t5", 2), ("clip_text", 3), ("clip_image", 1), ("null", 1))
    assert context.painting is None
    assert [part.shape for part in streams.embed(conditioning)] == [(1, 7), (1, 7)]


def test_the_null_token_is_never_masked() -> None:
    """With every stream dropped, attention still has the null token and the image constant."""
    streams, conditioning = projections()
    mask_BT = streams.context(conditioning.null(), C_NOISE_B).mask_BT
    assert mask_BT[0].nonzero().flatten().tolist() == [5, 6]


def test_embeddings_in_storage_precision_are_projected_in_the_networks() -> None:
    """A bf16 cache enters a float32 network as its float32 values."""
    streams, conditioning = projections()
    stored = conditioning.to(dtype=torch.bfloat16)
    expected = streams.context(stored.to(dtype=torch.float32), C_NOISE_B).tokens_BTD
    assert torch.equal(streams.context(stored, C_NOISE_B).tokens_BTD, expected)


def test_a_missing_stream_is_named() -> None:
    """A conditioning of other encoders than the network's is refused."""
    streams, conditioning = projections()
    del conditioning.streams["clip_text"]
    with pytest.raises(ValueError, match="t5, clip_text, clip_image; clip_text is missing"):
        streams.context(conditioning, C_NOISE_B)


def test_a_stream_without_its_tensors_is_named() -> None:
    """A stream that lacks the tokens its config promises is refused."""
    streams, conditioning = projections()
    conditioning.streams["t5"] = Stream(pooled_BD=torch.zeros(1, 5))
    with pytest.raises(ValueError, match="stream t5 must have token width 5"):
        streams.context(conditioning, C_NOISE_B)
