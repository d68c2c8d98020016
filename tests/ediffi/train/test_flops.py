"""Tests of ediffi.train.flops: operations against counts by hand, peaks by name and by measure."""

import time

import pytest
import torch

from ediffi.conditioning import Conditioning, Stream, StreamConfig
from ediffi.efficient_unet import EfficientUNetConfig
from ediffi.train import flops
from ediffi.train.flops import TERA, count_flops, peak_flops, published_peak
from ediffi.unet import UNetConfig

TEXT = StreamConfig(name="text", token_width=6, pooled_width=4)


def conv(in_width: int, out_width: int, side: int, out_px: int) -> int:
    """Multiply-adds, times two, of one convolution over a feature map."""
    return 2 * in_width * out_width * side**2 * out_px**2


def residual(in_width: int, out_width: int, embedding_width: int, px: int) -> int:
    """Forward FLOPs of a residual block: two convolutions, scale and shift, skip."""
    skip = conv(in_width, out_width, 1, px) if in_width != out_width else 0
    return (
        conv(in_width, out_width, 3, px)
        + 2 * embedding_width * 2 * out_width
        + conv(out_width, out_width, 3, px)
        + skip
    )


def attentions(width: int, px: int, context_width: int, num_tokens: int) -> int:
    """Forward FLOPs of self-attention and cross-attention."""
    pixels = px**2
    own = conv(width, 4 * width, 1, px) + 2 * 2 * pixels * pixels * width
    cross = (
        conv(width, 2 * width, 1, px)
        + 2 * num_tokens * context_width * 2 * width
        + 2 * 2 * pixels * num_tokens * width
    )
    return own + cross


def test_count_equals_the_count_by_hand():
    """A one-level network: every convolution, linear layer and attention, and twice that back."""
    width, context, embedding, px, tokens = 8, 16, 12, 4, 15
    config = UNetConfig(
        image_px=px,
        widths=(width,),
        num_blocks=1,
        self_attention_px=(px,),
        cross_attention_px=(px,),
        head_width=4,
        context_width=context,
        embedding_width=embedding,
        streams=(TEXT,),
    )
    padded = 16  # 15 tokens and the null token
    # No gradient with respect to picture and noise level: two of three products are computed. The
    # embeddings are followed by a LayerNorm that learns, so that theirs are.
    first = conv(3, width, 3, px) + 2 * width * embedding
    others = (
        2 * embedding * embedding  # the noise embedding's second layer
        + 2 * 4 * embedding  # the pooled vector
        + 2 * tokens * 6 * context  # the tokens
        + residual(width, width, embedding, px)  # encoder
        + residual(width, width, embedding, px)  # middle, in
        + residual(width, width, embedding, px)  # middle, out
        + 2 * residual(2 * width, width, embedding, px)  # decoder
        + 4 * attentions(width, px, context, padded)
        + conv(width, 3, 3, px)
    )
    assert count_flops(config).image({"text": tokens}) == 2 * first + 3 * others


def test_cost_of_any_number_of_tokens_is_exact_and_proportional_to_the_batch():
    """It equals a count of its own; a batch costs as its images with the tokens padded to."""
    config = UNetConfig(
        image_px=8,
        widths=(8, 16),
        num_blocks=1,
        cross_attention_px=(4,),
        head_width=8,
        streams=(
            TEXT,
            StreamConfig(name="clip", pooled_width=4, pooled_as_token=True),
            StreamConfig(name="other", token_width=10),
        ),
    )
    counted = count_flops(config)
    network = flops._meta_network(config)
    for text, other in ((0, 0), (14, 0), (15, 0), (16, 3), (77, 113), (0, 30)):
        num_tokens = {"text": text, "other": other}
        assert counted.image(num_tokens) == flops._count(network, config, num_tokens)
    stream = Stream(torch.zeros(3, 32, 6), torch.ones(3, 32, dtype=torch.bool), torch.zeros(3, 4))
    conditioning = Conditioning({"text": stream, "clip": Stream(pooled_BD=torch.zeros(3, 4))}, 3)
    assert counted.batch(conditioning) == 3 * counted.image({"text": 32})


def test_super_resolution_network_is_counted():
    """But for what does not depend on the pixels, twice their side costs four times as much."""

    def sized(image_px: int) -> float:
        config = EfficientUNetConfig(image_px=image_px, widths=(8, 16), num_blocks=(1, 1))
        return count_flops(config).image({})

    assert sized(128) - sized(64) == 4 * (sized(64) - sized(32))


def test_the_papers_base_costs_neither_memory_nor_long():
    """Seven hundred million parameters: 1.4 TFLOP an image, three times the forward pass."""
    config = UNetConfig(
        image_px=64,
        widths=(256, 512, 1024, 1024),
        num_blocks=3,
        self_attention_px=(32, 16, 8),
        cross_attention_px=(32, 16, 8),
        context_width=1024,
        embedding_width=1024,
        streams=(StreamConfig(name="t5", token_width=4096),),
    )
    random_state = torch.get_rng_state()
    started_s = time.perf_counter()
    found = count_flops(config)
    assert time.perf_counter() - started_s < 30
    assert 1.2 * TERA < found.image({"t5": 113}) < 1.6 * TERA
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "fp32", 494.7),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L40", "fp32", 90.5),
        ("Tesla V100-SXM2-32GB", "fp32", 15.7),
        ("Tesla V100-PCIE-16GB", "fp32", 14),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
    ],
)
def test_published_peaks_are_found_by_the_devices_own_name(name, precision, tera):
    """Names as drivers give them; look-alikes (A10, A100, A10G; H20, H200) are kept apart."""
    peak = published_peak(name, precision, allow_tf32=True)
    assert peak is not None
    assert peak.flops_per_s == pytest.approx(tera * TERA)
    assert f"published for {name}" in str(peak)


def test_fp32_without_tf32_has_the_lower_peak():
    """Whoever forbids TF32 is measured against what is left."""
    peak = published_peak("NVIDIA A100-SXM4-80GB", "fp32", allow_tf32=False)
    assert peak is not None
    assert peak.flops_per_s == 19.5 * TERA


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("Tesla V100-SXM2-32GB", "bf16"),  # has no such unit
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),  # another chip
        ("NVIDIA A1000", "bf16"),
    ],
)
def test_unknown_devices_have_no_published_peak(name, precision):
    """They are measured instead of guessed."""
    assert published_peak(name, precision, allow_tf32=True) is None


def test_cpu_is_measured_once_for_each_number_of_threads():
    """The second call costs nothing, and the text says how it was measured."""
    device, num_threads = torch.device("cpu"), torch.get_num_threads()
    random_state = torch.get_rng_state()
    peak = peak_flops(device, "fp32")
    assert 1e9 < peak.flops_per_s < 1e14
    assert f"in fp32, {num_threads} threads" in str(peak)
    started_s = time.perf_counter()
    assert peak_flops(device, "fp32") is peak
    assert time.perf_counter() - started_s < 0.1
    assert torch.equal(torch.get_rng_state(), random_state)
