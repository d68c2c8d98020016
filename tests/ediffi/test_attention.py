"""Attention and painting with words against their formulas (paper section 5).

Shapes: B batch, C channels, H W feature map or painting, I queries, T tokens, D width, N heads.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ediffi.attention import Context, ContextPart, attention, attention_weights, join_context
from ediffi.layers import CrossAttention

MASK_BT = torch.tensor([[True, False, True, True], [False, False, True, False]])


def queries_keys_values(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (2, 3, 5, 8) and k, v (2, 3, 4, 8)."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 5, 8), (2, 3, 4, 8), (2, 3, 4, 8)]
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask_BT: Tensor) -> Tensor:
    """Masked attention by its definition: normalised exponentials over the real tokens."""
    weights = torch.exp(torch.einsum("bnid,bntd->bnit", q, k) / math.sqrt(q.shape[-1]))
    weights = weights * mask_BT[:, None, None]
    return torch.einsum("bnit,bntd->bnid", weights / weights.sum(-1, keepdim=True), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_a_softmax_over_the_real_tokens(dtype: torch.dtype) -> None:
    """Fused and explicit paths equal the definition, masked tokens left out."""
    q, k, v = queries_keys_values(dtype)
    expected = explicit_attention(q.float(), k.float(), v.float(), MASK_BT)
    tolerance = 1e-6 if dtype == torch.float32 else 3e-2
    found = attention(q, k, v, MASK_BT).float()
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_a_score_hook_of_identity_changes_nothing() -> None:
    """The path with a hook computes the same attention as the fused kernel."""
    q, k, v = queries_keys_values()
    hooked = attention(q, k, v, MASK_BT, score_hook=lambda scores_BNIT: scores_BNIT)
    torch.testing.assert_close(hooked, attention(q, k, v, MASK_BT))


def test_a_score_hook_steers_attention_but_cannot_revive_padding() -> None:
    """Raising one token's score gives its value alone, unless the mask hides that token."""
    q, k, v = queries_keys_values()
    raised = torch.tensor([0.0, 0.0, 1e4, 0.0])
    found = attention(q, k, v, MASK_BT, score_hook=lambda scores_BNIT: scores_BNIT + raised)
    torch.testing.assert_close(found, v[:, :, 2:3].expand(-1, -1, 5, -1))
    hidden = torch.tensor([0.0, 1e4, 0.0, 0.0])
    found = attention(q, k, v, MASK_BT, score_hook=lambda scores_BNIT: scores_BNIT + hidden)
    torch.testing.assert_close(found, attention(q, k, v, MASK_BT))


def painted_context(
    paint_BTHW: Tensor | None, sigma_B: Tensor, tokens_BTD: Tensor, mask_BT: Tensor
) -> Context:
    """Return a context of one painted stream and a null token of zeros, padded to 8 tokens."""
    null = ContextPart("null", torch.zeros_like(tokens_BTD[:, :1]), torch.ones_like(mask_BT[:, :1]))
    stream = ContextPart("t5", tokens_BTD, mask_BT, paint_BTHW)
    return join_context([stream, null], sigma_B.log() / 4, multiple=8)


SIGMA_B = torch.tensor([80.0, 0.5])
SIZE = (4, 6)  # of the feature map, not square


def layer_and_inputs() -> tuple[CrossAttention, Tensor, Tensor, Tensor, Tensor]:
    """Return a layer with two heads, a feature map, tokens, their mask, and paint of its size."""
    torch.manual_seed(0)
    layer = CrossAttention(16, head_width=8, context_width=5)
    mask_BT = torch.tensor([[True, True, True], [True, True, False]])
    paint_BTHW = torch.rand(2, 3, *SIZE)
    return layer, torch.randn(2, 16, *SIZE), torch.randn(2, 3, 5), mask_BT, paint_BTHW


def test_painting_is_the_papers_formula() -> None:
    """softmax((QK^T + w A) / sqrt(d)) V, w = w' log(1 + sigma) max(QK^T), the maximum a sample's.

    Computed sample by sample, real tokens alone, from the layer's own projections.
    """
    layer, x_BCHW, tokens_BTD, mask_BT, paint_BTHW = layer_and_inputs()
    found = layer(x_BCHW, painted_context(paint_BTHW, SIGMA_B, tokens_BTD, mask_BT))
    for b in range(2):
        real_TD = torch.cat([tokens_BTD[b, mask_BT[b]], torch.zeros(1, 5)])
        paint_THW = torch.cat([paint_BTHW[b, mask_BT[b]], torch.zeros(1, *SIZE)])
        queries_CHW = layer.q(layer.norm(x_BCHW[b : b + 1]))[0]
        q_NDI = queries_CHW.reshape(2, 8, 24)
        keys_TC, values_TC = layer.kv(real_TD).chunk(2, dim=1)
        scores_NIT = torch.einsum("ndi,tnd->nit", q_NDI, keys_TC.reshape(-1, 2, 8))
        w = math.log(1 + SIGMA_B[b]) * scores_NIT.max()
        painted_NIT = scores_NIT + w * paint_THW.reshape(-1, 24).T
        weights_NIT = torch.softmax(painted_NIT / math.sqrt(8), dim=2)
        out_CI = torch.einsum("nit,tnd->ndi", weights_NIT, values_TC.reshape(-1, 2, 8))
        expected = x_BCHW[b : b + 1] + layer.out(out_CI.reshape(1, 16, *SIZE))
        torch.testing.assert_close(found[b : b + 1], expected, atol=1e-5, rtol=1e-5)


def test_paint_without_weight_changes_no_score() -> None:
    """All zeros give the values of no painting, to the bit of the same kernel."""
    layer, x_BCHW, tokens_BTD, mask_BT, paint_BTHW = layer_and_inputs()
    blank = painted_context(torch.zeros_like(paint_BTHW), SIGMA_B, tokens_BTD, mask_BT)
    plain = painted_context(None, SIGMA_B, tokens_BTD, mask_BT)
    assert torch.equal(layer.weights(x_BCHW, blank), layer.weights(x_BCHW, plain))
    torch.testing.assert_close(layer(x_BCHW, blank), layer(x_BCHW, plain))


def test_a_sample_is_painted_alike_alone_and_among_others() -> None:
    """The maximum is its own: another sample's large scores do not strengthen its painting."""
    layer, x_BCHW, tokens_BTD, mask_BT, paint_BTHW = layer_and_inputs()
    loud_BTD = tokens_BTD * torch.tensor([1.0, 100.0]).view(2, 1, 1)
    together = layer(x_BCHW, painted_context(paint_BTHW, SIGMA_B, loud_BTD, mask_BT))
    one = slice(0, 1)
    context = painted_context(paint_BTHW[one], SIGMA_B[one], loud_BTD[one], mask_BT[one])
    torch.testing.assert_close(together[one], layer(x_BCHW[one], context), atol=1e-5, rtol=1e-5)


def test_padding_neither_counts_in_the_maximum_nor_gets_painted_in() -> None:
    """Whatever a masked token holds and however it is painted, the output stays."""
    layer, x_BCHW, tokens_BTD, mask_BT, paint_BTHW = layer_and_inputs()
    expected = layer(x_BCHW, painted_context(paint_BTHW, SIGMA_B, tokens_BTD, mask_BT))
    tokens_BTD[1, 2], paint_BTHW[1, 2] = 1e3, 50.0
    found = layer(x_BCHW, painted_context(paint_BTHW, SIGMA_B, tokens_BTD, mask_BT))
    torch.testing.assert_close(found, expected)


def test_masks_are_resized_bilinearly_once_a_resolution() -> None:
    """Layers of one resolution share the resized planes; antialiased, so that no pixel is lost."""
    _, _, tokens_BTD, mask_BT, _ = layer_and_inputs()
    paint_BTHW = torch.zeros(2, 3, 16, 16)
    paint_BTHW[:, 1, 5, 7] = 1.0  # one pixel, which sampling every fourth would miss
    sigma_B = torch.full((2,), math.e - 1)  # log(1 + sigma) = 1
    painting = painted_context(paint_BTHW, sigma_B, tokens_BTD, mask_BT).painting
    assert painting is not None
    scores_BNIT = torch.full((2, 1, 16, 8), 3.0)
    painted = painting.score_hook((4, 4))(scores_BNIT)
    plane_HW = (painted - scores_BNIT)[0, 0, :, 1].view(4, 4) / 3.0
    expected = functional.interpolate(
        paint_BTHW, size=(4, 4), mode="bilinear", align_corners=False, antialias=True
    )
    torch.testing.assert_close(plane_HW, expected[0, 1])
    assert float(plane_HW.sum()) == pytest.approx(1 / 16, rel=0.05)
    painting.score_hook((4, 4)), painting.score_hook((2, 2))
    assert sorted(painting._at_size) == [(2, 2), (4, 4)]


def test_paint_of_different_streams_lies_under_its_own_tokens() -> None:
    """Planes follow the order of the parts; unpainted parts and padding are blank."""
    sigma_B = torch.full((1,), math.e - 1)
    mask_B2 = torch.ones(1, 2, dtype=torch.bool)
    first = ContextPart("t5", torch.randn(1, 2, 5), mask_B2, torch.full((1, 2, 4, 4), 0.25))
    middle = ContextPart("clip_image", torch.randn(1, 1, 5), mask_B2[:, :1])
    last = ContextPart("clip_text", torch.randn(1, 2, 5), mask_B2, torch.ones(1, 2, 2, 2))
    context = join_context([first, middle, last], sigma_B.log() / 4, multiple=4)
    assert context.columns == (("t5", 2), ("clip_image", 1), ("clip_text", 2))
    assert context.painting is not None
    added = context.painting.score_hook((2, 2))(torch.ones(1, 1, 4, 8)) - 1
    expected = torch.tensor([0.25, 0.25, 0, 1, 1, 0, 0, 0]).expand(4, 8)
    torch.testing.assert_close(added[0, 0], expected)


def test_weights_are_those_that_attention_averages_with() -> None:
    """The explicit weights times the values give the fused kernel's output."""
    q, k, v = queries_keys_values()
    weights = attention_weights(q, k, MASK_BT)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))
    assert not weights.masked_select(~MASK_BT[:, None, None].expand_as(weights)).any()
    torch.testing.assert_close(weights @ v, attention(q, k, v, MASK_BT))


@pytest.mark.parametrize("sigma", [1e-8, 2e-3, 80.0, 1e8])
def test_the_weight_of_painting_is_exact_over_all_noise_levels(sigma: float) -> None:
    """log(1 + sigma) neither vanishes at small sigma nor overflows at large."""
    context = painted_context(
        torch.ones(1, 1, 1, 1),
        torch.tensor([sigma]),
        torch.randn(1, 1, 5),
        torch.ones(1, 1, dtype=torch.bool),
    )
    assert context.painting is not None
    scores_BNIT = torch.tensor([0.0, 1.0, 0, 0, 0, 0, 0, 0]).view(1, 1, 1, 8)
    painted = context.painting.score_hook((1, 1))(scores_BNIT)
    assert painted[0, 0, 0, 0].item() == pytest.approx(math.log1p(sigma), rel=1e-5)
    assert torch.equal(painted[..., 1:], scores_BNIT[..., 1:])
