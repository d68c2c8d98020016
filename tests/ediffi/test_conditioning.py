"""Streams of a batch: collating, dropping, null, selecting and joining.

Shapes: B batch, T tokens, D width, H W painting.
"""

import json
import re

import pytest
import torch
from torch import Tensor

from ediffi.conditioning import Conditioning, Stream, StreamConfig, collate
from ediffi.paint_planes import resize_paint

STREAMS = (
    StreamConfig(name="t5", token_width=3),
    StreamConfig(name="clip_text", token_width=2, pooled_width=4),
    StreamConfig(name="clip_image", pooled_width=4, pooled_as_token=True),
)


def sample(num_tokens: int) -> dict[str, dict[str, Tensor]]:
    """Return one cached sample with `num_tokens` T5 tokens."""
    return {
        "t5": {"tokens": torch.rand(num_tokens, 3) + 1},
        "clip_text": {"tokens": torch.rand(2, 2) + 1, "pooled": torch.rand(4) + 1},
        "clip_image": {"pooled": torch.rand(4) + 1},
    }


def assert_equal(found: Conditioning, expected: Conditioning) -> None:
    """Assert that two conditionings hold the same tensors."""
    assert found.batch_size == expected.batch_size
    assert list(found.streams) == list(expected.streams)
    for name, stream in expected.streams.items():
        for part in ("tokens_BTD", "mask_BT", "pooled_BD", "paint_BTHW"):
            ours, theirs = getattr(found.streams[name], part), getattr(stream, part)
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs), (name, part)


def test_collate_pads_ragged_tokens_with_masked_zeros() -> None:
    """Short sequences end in zeros whose mask is False; pooled vectors are stacked."""
    samples = [sample(1), sample(4)]
    conditioning = collate(samples, STREAMS)
    t5 = conditioning.streams["t5"]
    assert t5.tokens_BTD is not None
    assert t5.mask_BT is not None
    assert t5.mask_BT.tolist() == [[True, False, False, False], [True] * 4]
    assert torch.equal(t5.tokens_BTD[0, :1], samples[0]["t5"]["tokens"])
    assert not t5.tokens_BTD[0, 1:].any()
    pooled_BD = conditioning.streams["clip_image"].pooled_BD
    assert pooled_BD is not None
    assert torch.equal(pooled_BD[1], samples[1]["clip_image"]["pooled"])
    assert conditioning.streams["clip_image"].tokens_BTD is None


def test_collate_keeps_the_storage_dtype() -> None:
    """Embeddings cached in bf16 stay bf16, also where a sample lacks the stream."""
    cached = {"t5": {"tokens": torch.ones(2, 3, dtype=torch.bfloat16)}}
    tokens_BTD = collate([{}, cached], STREAMS[:1]).streams["t5"].tokens_BTD
    assert tokens_BTD is not None
    assert tokens_BTD.dtype == torch.bfloat16


def test_a_sample_without_streams_equals_a_dropped_one() -> None:
    """The missing policy "null" gives what dropping every stream gives."""
    present = [sample(4), sample(2)]
    keep = {config.name: torch.tensor([True, False]) for config in STREAMS}
    assert_equal(collate([present[0], {}], STREAMS), collate(present, STREAMS).drop(keep))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            {"clip_text": {"tokens": torch.zeros(2, 2)}},
            "sample 1: stream clip_text must have pooled (4,), got only tokens",
        ),
        (
            {"t5": {"tokens": torch.zeros(2, 7)}},
            "sample 1: tokens of stream t5 must have shape (T, 3), got (2, 7)",
        ),
        (
            {"clip_image": {"pooled": torch.zeros(1, 4)}},
            "sample 1: pooled of stream clip_image must have shape (4,), got (1, 4)",
        ),
    ],
)
def test_collate_names_sample_and_stream_of_a_bad_tensor(
    broken: dict[str, dict[str, Tensor]], message: str
) -> None:
    """A missing member or a wrong width is refused with sample, stream, required and found."""
    with pytest.raises(ValueError, match=re.escape(message)):
        collate([sample(1), sample(1) | broken], STREAMS)


def test_collate_refuses_an_empty_batch() -> None:
    """No samples is a mistake of the caller."""
    with pytest.raises(ValueError, match="at least one sample"):
        collate([], STREAMS)


def test_drop_zeroes_the_stream_whole_and_only_where_asked() -> None:
    """A dropped stream loses tokens, mask and pooled vector; other streams and samples stay."""
    conditioning = collate([sample(3), sample(3)], STREAMS)
    dropped = conditioning.drop({"clip_text": torch.tensor([False, True])})
    text = dropped.streams["clip_text"]
    assert text.tokens_BTD is not None
    assert text.mask_BT is not None
    assert text.pooled_BD is not None
    assert not text.tokens_BTD[0].any()
    assert not text.mask_BT[0].any()
    assert not text.pooled_BD[0].any()
    kept = torch.tensor([1])
    assert_equal(dropped.select(kept), conditioning.select(kept))
    assert dropped.streams["t5"] is conditioning.streams["t5"]


def test_drop_removes_even_infinities() -> None:
    """A damaged embedding cannot leak a NaN through a dropped stream."""
    stream = Stream(pooled_BD=torch.full((1, 2), torch.inf))
    dropped = Conditioning({"clip": stream}, 1).drop({"clip": torch.tensor([False])})
    pooled_BD = dropped.streams["clip"].pooled_BD
    assert pooled_BD is not None
    assert torch.equal(pooled_BD, torch.zeros(1, 2))


def test_drop_refuses_an_unknown_stream() -> None:
    """A misspelt stream name is an error that lists the streams."""
    with pytest.raises(ValueError, match=r"t6.*t5, clip_text, clip_image"):
        collate([sample(1)], STREAMS).drop({"t6": torch.tensor([True])})


def test_null_equals_a_fully_dropped_batch() -> None:
    """The unconditional branch is an input that training has seen."""
    conditioning = collate([sample(3), sample(1)], STREAMS)
    nothing = torch.zeros(2, dtype=torch.bool)
    dropped = conditioning.drop({config.name: nothing for config in STREAMS})
    assert_equal(conditioning.null(), dropped)


@pytest.mark.parametrize("chosen", [torch.tensor([2, 0]), torch.tensor([True, False, True])])
def test_select_takes_indices_and_masks(chosen: Tensor) -> None:
    """Selecting equals collating the chosen samples, up to the padding they arrived with."""
    samples = [sample(3), sample(3), sample(3)]
    picked = [samples[i] for i in torch.arange(3)[chosen].tolist()]
    assert_equal(collate(samples, STREAMS).select(chosen), collate(picked, STREAMS))


def test_concatenate_pads_to_the_longest_sequence() -> None:
    """Joining two batches equals collating all their samples at once."""
    samples = [sample(2), sample(5), sample(1)]
    parts = [collate(samples[:1], STREAMS), collate(samples[1:], STREAMS)]
    assert_equal(Conditioning.concatenate(parts), collate(samples, STREAMS))


def test_concatenate_refuses_different_streams() -> None:
    """Batches of different encoders do not join."""
    parts = [collate([sample(1)], STREAMS), collate([sample(1)], STREAMS[:1])]
    with pytest.raises(ValueError, match="same streams"):
        Conditioning.concatenate(parts)


def test_repeat_repeats_the_whole_batch() -> None:
    """Two copies are the batch joined to itself."""
    conditioning = collate([sample(2), sample(3)], STREAMS)
    assert_equal(conditioning.repeat(2), Conditioning.concatenate([conditioning] * 2))


def test_an_unconditional_batch_has_a_size() -> None:
    """Without streams, select, repeat and concatenate still count samples."""
    empty = Conditioning({}, 3)
    assert empty.select(torch.tensor([True, False, True])).batch_size == 2
    assert Conditioning.concatenate([empty.repeat(2), empty.null()]).batch_size == 9


def test_to_casts_floats_and_leaves_masks_bool() -> None:
    """A change of dtype must not turn masks into numbers."""
    stream = collate([sample(2)], STREAMS).to("cpu", torch.float64).streams["clip_text"]
    assert stream.tokens_BTD is not None
    assert stream.mask_BT is not None
    assert stream.pooled_BD is not None
    assert stream.tokens_BTD.dtype == stream.pooled_BD.dtype == torch.float64
    assert stream.mask_BT.dtype == torch.bool


@pytest.mark.parametrize(
    ("mask_BT", "message"),
    [
        (None, "together"),
        (torch.ones(2, 3), "must be bool"),
        (torch.ones(2, 4, dtype=torch.bool), r"shape \(2, 3\).*\(2, 4\)"),
    ],
)
def test_a_stream_checks_its_mask(mask_BT: Tensor | None, message: str) -> None:
    """Tokens need a bool mask of their own shape."""
    with pytest.raises(ValueError, match=message):
        Stream(tokens_BTD=torch.zeros(2, 3, 5), mask_BT=mask_BT)


def test_streams_must_share_the_batch_size() -> None:
    """A stream of another batch is refused by name."""
    with pytest.raises(ValueError, match="stream clip must have batch_size 3, got 2"):
        Conditioning({"clip": Stream(pooled_BD=torch.zeros(2, 1))}, 3)


@pytest.mark.parametrize("config", STREAMS)
def test_stream_config_survives_json(config: StreamConfig) -> None:
    """Writing and reading gives an equal config."""
    assert StreamConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "T5 xxl", "token_width": 1}, "identifier"),
        ({"name": "t5"}, "tokens or a pooled vector"),
        ({"name": "t5", "token_width": -1}, "token_width of stream t5"),
        ({"name": "t5", "token_width": 1, "dropout": 1.5}, r"dropout of stream t5.*\[0, 1\]"),
        ({"name": "t5", "token_width": 1, "pooled_as_token": True}, "set pooled_width"),
        ({"name": "t5", "tokenwidth": 1}, "no field tokenwidth.*token_width"),
    ],
)
def test_stream_config_explains_what_is_wrong(fields: dict[str, object], message: str) -> None:
    """Each bad field is named with what was required."""
    with pytest.raises(ValueError, match=message):
        StreamConfig.from_json(fields)


def enlarged(num: int = 3) -> Conditioning:
    """Return a batch with one stream and low-resolution pictures of different brightness."""
    low_res_BCHW = torch.arange(num, dtype=torch.float32).view(-1, 1, 1, 1).expand(num, 3, 2, 2)
    return Conditioning({"clip": Stream(pooled_BD=torch.ones(num, 2))}, num, low_res_BCHW)


def brightness(conditioning: Conditioning) -> list[float]:
    """Return the brightness of each low-resolution picture."""
    assert conditioning.low_res_BCHW is not None
    return conditioning.low_res_BCHW[:, 0, 0, 0].tolist()


def test_low_resolution_pictures_go_where_their_samples_go() -> None:
    """Selecting, repeating, joining and moving take them along."""
    conditioning = enlarged()
    assert brightness(conditioning.select(torch.tensor([2, 0]))) == [2, 0]
    assert brightness(conditioning.repeat(2)) == [0, 1, 2, 0, 1, 2]
    assert brightness(Conditioning.concatenate([conditioning, enlarged(1)])) == [0, 1, 2, 0]
    moved = conditioning.to(dtype=torch.bfloat16).low_res_BCHW
    assert moved is not None
    assert moved.dtype == torch.bfloat16


def test_dropping_streams_keeps_low_resolution_pictures() -> None:
    """They are what is enlarged: neither dropout nor the null conditioning takes them."""
    conditioning = enlarged()
    dropped = conditioning.drop({"clip": torch.zeros(3, dtype=torch.bool)})
    for one in (dropped, conditioning.null()):
        assert brightness(one) == [0, 1, 2]
        assert not one.streams["clip"].pooled_BD.any()


def test_low_resolution_pictures_must_fit_their_batch() -> None:
    """One for every sample, and in all batches that are joined or in none."""
    with pytest.raises(ValueError, match="low_res_BCHW must have batch_size 3, got 2"):
        Conditioning({}, 3, torch.zeros(2, 3, 4, 4))
    lacking = Conditioning(enlarged().streams, 3)
    with pytest.raises(ValueError, match="only some batches have low_res_BCHW"):
        Conditioning.concatenate([enlarged(), lacking])


def painted(*lengths: int, size: tuple[int, int] = (4, 6)) -> Conditioning:
    """Return samples of so many T5 tokens whose T5 stream is painted at random."""
    conditioning = collate([sample(length) for length in lengths], STREAMS)
    t5 = conditioning.streams["t5"]
    assert t5.tokens_BTD is not None
    t5.paint_BTHW = torch.rand(*t5.tokens_BTD.shape[:2], *size)
    return conditioning


def paint_of(conditioning: Conditioning, name: str = "t5") -> Tensor:
    """Return the planes of one stream."""
    paint_BTHW = conditioning.streams[name].paint_BTHW
    assert paint_BTHW is not None
    return paint_BTHW


def test_paint_goes_where_its_samples_go() -> None:
    """Selecting and repeating take the planes along; moving keeps them floating point."""
    conditioning = painted(3, 2)
    planes = paint_of(conditioning)
    assert torch.equal(paint_of(conditioning.select(torch.tensor([1]))), planes[1:])
    assert torch.equal(paint_of(conditioning.repeat(2)), torch.cat([planes, planes]))
    assert paint_of(conditioning.to(dtype=torch.float64)).dtype == torch.float64


def test_dropping_a_stream_blanks_its_paint_and_null_forgets_it() -> None:
    """What is dropped is not painted; the null conditioning never is, nor slowed by it."""
    conditioning = painted(3, 2)
    dropped = conditioning.drop({"t5": torch.tensor([False, True])})
    assert not paint_of(dropped)[0].any()
    assert torch.equal(paint_of(dropped)[1], paint_of(conditioning)[1])
    assert all(stream.paint_BTHW is None for stream in conditioning.null().streams.values())
    assert_equal(conditioning.null(), plain(conditioning).null())


def plain(conditioning: Conditioning) -> Conditioning:
    """Return the conditioning without any paint."""
    streams = {name: stream.without_paint() for name, stream in conditioning.streams.items()}
    return Conditioning(streams, conditioning.batch_size)


def test_joining_blanks_what_is_not_painted() -> None:
    """Unpainted batches get zeros, for the tokens of padding too; painted planes stay."""
    first, second = painted(2), painted(5)
    joined = Conditioning.concatenate([first, plain(second), second])
    planes = paint_of(joined)
    assert planes.shape == (3, 5, 4, 6)
    assert torch.equal(planes[0, :2], paint_of(first)[0])
    assert not planes[0, 2:].any()
    assert not planes[1].any()
    assert torch.equal(planes[2], paint_of(second)[0])
    unpainted = Conditioning.concatenate([plain(first), plain(second), plain(second)])
    assert_equal(plain(joined), unpainted)


def test_joining_brings_paint_to_the_largest_size() -> None:
    """A smaller painting is enlarged, a blank one made, at the height and width of the largest."""
    small, large = painted(2, size=(2, 3)), painted(2, size=(4, 6))
    planes = paint_of(Conditioning.concatenate([small, large, small.null()]))
    assert torch.equal(planes[:1], resize_paint(paint_of(small), (4, 6)))
    assert torch.equal(planes[1:2], paint_of(large))
    assert not planes[2].any()


def test_resizing_paint_keeps_even_planes_even() -> None:
    """A constant plane stays constant, larger or smaller; the same size gives the same values."""
    paint_BTHW = torch.full((1, 2, 6, 4), 0.4)
    for size in ((2, 2), (9, 5), (6, 4)):
        expected = torch.full((1, 2, *size), 0.4)
        torch.testing.assert_close(resize_paint(paint_BTHW, size), expected)


@pytest.mark.parametrize(
    ("paint_BTHW", "message"),
    [
        (torch.zeros(1, 2, 4, 4), r"shape \(1, 3, 'H', 'W'\).*got \(1, 2, 4, 4\)"),
        (torch.zeros(1, 3, 4), "a plane for each token"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.bool), "must be floating point, got torch.bool"),
    ],
)
def test_paint_must_fit_its_tokens(paint_BTHW: Tensor, message: str) -> None:
    """A floating-point plane for each token, or an error that says so."""
    mask_BT = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        Stream(torch.zeros(1, 3, 2), mask_BT, paint_BTHW=paint_BTHW)


def test_only_tokens_can_be_painted() -> None:
    """A stream that is one pooled vector has no tokens to place."""
    with pytest.raises(ValueError, match="must have tokens_BTD to paint"):
        Stream(pooled_BD=torch.zeros(1, 2), paint_BTHW=torch.zeros(1, 1, 4, 4))
