"""Eight-bit token states: what is read back, how far off it is, and what is refused."""

import pytest
import torch

from ediffi.encoding.quantization import cosine_error, dequantize, quantize_tokens


def test_error_is_at_most_half_a_step_of_the_tokens_own_scale() -> None:
    """Tokens of very different size are each within half of their own step."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1e-6, 1.0, 1e4])[:, None]
    tokens = sizes * torch.randn(3, 256, generator=generator)
    quantized, scale = quantize_tokens(tokens)
    assert (quantized.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert ((tokens - quantized * scale[:, None]).abs() <= scale[:, None] * 0.5001).all()


def test_the_largest_value_is_exact_and_signs_are_symmetric() -> None:
    """The extreme of a token is one whole scale of 127 steps, and negation negates the steps."""
    tokens = torch.tensor([[0.5, -2.0, 1.0]])
    quantized, scale = quantize_tokens(tokens)
    assert quantized.tolist() == [[32, -127, 64]]
    assert torch.equal(quantize_tokens(-tokens)[0], -quantized)
    torch.testing.assert_close(scale, torch.tensor([2.0 / 127]))


def test_zero_tokens_and_no_tokens_are_kept() -> None:
    """A token of zeros comes back as zeros, and a sequence of no tokens as none."""
    quantized, scale = quantize_tokens(torch.zeros(2, 4))
    restored = dequantize({"tokens": quantized, "tokens_scale": scale})["tokens"]
    assert torch.equal(restored, torch.zeros(2, 4, dtype=torch.bfloat16))
    assert cosine_error(torch.zeros(2, 4), restored).tolist() == [0.0, 0.0]
    assert [tuple(x.shape) for x in quantize_tokens(torch.zeros(0, 4))] == [(0, 4), (0,)]


def test_a_batch_is_quantized_token_by_token() -> None:
    """Leading axes change nothing: each sample of a batch is stored as it is alone."""
    tokens = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    together = quantize_tokens(tokens)
    for i in range(3):
        alone = quantize_tokens(tokens[i])
        assert all(torch.equal(a[i], b) for a, b in zip(together, alone))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    """A token with a NaN or inf does not turn into finite numbers."""
    quantized, scale = quantize_tokens(torch.tensor([[1.0, bad], [1.0, 2.0]]))
    assert scale.isfinite().tolist() == [False, True]
    assert quantized[1].tolist() == [64, 127]


def test_other_tensors_pass_untouched() -> None:
    """Samples without a scale are returned as they are; with one, only tokens change, to bf16."""
    plain = {"tokens": torch.ones(2, 3), "pooled": torch.ones(3)}
    assert all(dequantize(plain)[name] is tensor for name, tensor in plain.items())
    quantized, scale = quantize_tokens(torch.ones(2, 3))
    read = dequantize({"tokens": quantized, "tokens_scale": scale, "pooled": plain["pooled"]})
    assert read.keys() == {"tokens", "pooled"}
    assert read["tokens"].dtype == torch.bfloat16
    assert read["pooled"] is plain["pooled"]


@pytest.mark.parametrize(
    "tensors",
    [
        {"tokens_scale": torch.ones(2)},
        {"tokens": torch.ones(2, 3), "tokens_scale": torch.ones(2)},
        {"tokens": torch.ones(2, 3, dtype=torch.int8), "tokens_scale": torch.ones(3)},
    ],
)
def test_a_scale_without_its_tokens_is_refused(tensors: dict[str, torch.Tensor]) -> None:
    """The error names both tensors and what was found."""
    with pytest.raises(ValueError, match=r"tokens_scale of shape .* must come with int8 tokens"):
        dequantize(tensors)


def test_cosine_error_against_closed_forms() -> None:
    """Equal: 0; at right angles: 1; opposite: 2; a small angle a: a squared over two."""
    a = torch.tensor([[1.0, 0.0]] * 4)
    angle = 1e-3
    b = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [1.0, angle]])
    expected = torch.tensor([0.0, 1.0, 2.0, angle**2 / 2])
    torch.testing.assert_close(cosine_error(a, b), expected, rtol=1e-3, atol=0)
