"""One shard of a cache: the same samples in the same order, whatever happened on the way."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from ediffi.encoders import Encoder, ImageEncoder, load_encoder
from ediffi.encoding import embedding
from ediffi.encoding.embedding import embed_shard
from ediffi.encoding.encoder_weights import EncoderConfig
from ediffi.encoding.quantization import dequantize
from ediffi.storage.shard_format import ShardWriter, decode_tensors, read_shard
from ediffi.storage.tar_index import ShardError
from tests.tiny_encoders import write_clip, write_t5

WORDS = ("red", "green", "blue", "disk", "on", "paper", "poison")
NUM_SAMPLES = 40
Members = dict[str, bytes]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, EncoderConfig]:
    """Tiny encoders by name, storing fp32; captions of up to 12 tokens."""
    folder = tmp_path_factory.mktemp("encoders")
    write_t5(folder / "t5", WORDS)
    write_clip(folder / "clip")
    clip = {"weights": str(folder / "clip"), "storage_dtype": "fp32"}
    return {
        "t5": EncoderConfig(
            family="transformers",
            weights=str(folder / "t5"),
            max_tokens=12,
            storage_dtype="fp32",
        ),
        "clip_text": EncoderConfig(family="open_clip_text", max_tokens=40, **clip),
        "clip_image": EncoderConfig(family="open_clip_image", **clip),
    }


def picture(colour: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (9, 9), (colour, 255 - colour, 7 * colour % 256)).save(stream, kind)
    return stream.getvalue()


def sample(index: int) -> Members:
    words = [WORDS[(index + i) % 6] for i in range(1 + index * 7 % 10)]
    return {"png": picture(index), "txt": " ".join(words).encode(), "json": b"{}"}


@pytest.fixture
def shard(tmp_path: Path) -> Callable[..., Path]:
    """Write the usual samples, but for those given by key, and extra ones, to `train.tar`."""

    def write(**changed: Members) -> Path:
        samples = {f"k{index:03d}": sample(index) for index in range(NUM_SAMPLES)} | changed
        with ShardWriter(tmp_path / "train.tar") as writer:
            for key, members in samples.items():
                writer.write(key, members)
        return tmp_path / "train.tar"

    return write


def embedded(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {key: decode_tensors(members["safetensors"]) for key, members in read_shard(path)}


def encoded_alone(encoder: Encoder, source: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every sample encoded by itself, by the encoder's own `encode`."""
    result = {}
    for key, members in read_shard(source):
        if isinstance(encoder, ImageEncoder):
            item = Image.open(io.BytesIO(members["png"]))
        else:
            item = members["txt"].decode()
        result[key] = encoder.encode([item])[0]
    return result


@pytest.mark.parametrize("name", ["t5", "clip_text", "clip_image"])
def test_a_cache_holds_what_each_sample_encodes_to_in_the_order_of_the_shard(
    name, configs, shard, tmp_path, monkeypatch
):
    """Sorted into small batches and back: each key has its own embedding, to 1e-5."""
    encoder = load_encoder(configs[name])
    monkeypatch.setattr(encoder, "batch_tokens", 30)
    monkeypatch.setattr(encoder, "batch_images", 7)
    source = shard()
    report = embed_shard(encoder, source, tmp_path / "out.tar")
    found, expected = embedded(tmp_path / "out.tar"), encoded_alone(encoder, source)
    assert list(found) == list(expected)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (report.num_in, report.num_out) == (NUM_SAMPLES, NUM_SAMPLES)
    assert (report.rejects, report.flagged) == ({}, {})
    assert (report.facts["num_nan"], report.facts["num_inf"]) == (0, 0)


@pytest.mark.parametrize("name", ["t5", "clip_text", "clip_image"])
def test_equal_shards_give_equal_bytes_and_facts(name, configs, shard, tmp_path, monkeypatch):
    """Neither the number of threads nor a spool that goes to disk at once changes a byte."""
    encoder = load_encoder(configs[name])
    first = embed_shard(encoder, shard(), tmp_path / "a.tar", num_threads=1)
    monkeypatch.setattr(embedding, "SPOOL_BYTES", 1)
    second = embed_shard(encoder, shard(), tmp_path / "b.tar", num_threads=3)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert first.facts == second.facts
    assert not list(tmp_path.glob("tmp*"))


def test_the_histogram_counts_stored_tokens(configs, shard, tmp_path):
    """`tokens` maps each length in the tar to how often it is there."""
    report = embed_shard(load_encoder(configs["t5"]), shard(), tmp_path / "out.tar")
    lengths = [len(tensors["tokens"]) for tensors in embedded(tmp_path / "out.tar").values()]
    assert report.facts["tokens"] == {str(n): lengths.count(n) for n in sorted(set(lengths))}


@pytest.mark.parametrize("too_long", ["truncate", "reject"])
def test_captions_beyond_max_tokens_are_cut_or_left_out_as_asked(
    too_long, configs, shard, tmp_path
):
    """Cut captions are flagged with their keys, rejected ones are not in the tar."""
    source = shard(k003={**sample(3), "txt": b"red " * 50}, k007={**sample(7), "txt": b"red " * 12})
    encoder = load_encoder(replace(configs["t5"], too_long=too_long))
    report = embed_shard(encoder, source, tmp_path / "out.tar")
    found = embedded(tmp_path / "out.tar")
    if too_long == "reject":
        assert report.rejects == {"caption_too_long": ["k003", "k007"]}
        assert (report.flagged, report.facts["num_truncated"]) == ({}, 0)
        assert found.keys() == {f"k{i:03d}" for i in range(NUM_SAMPLES)} - {"k003", "k007"}
    else:
        assert report.flagged == {"caption_too_long:truncated": ["k003", "k007"]}
        assert (report.rejects, report.facts["num_truncated"]) == ({}, 2)
        assert len(found["k003"]["tokens"]) == 12


def test_what_cannot_be_encoded_is_named_and_left_out(configs, shard, tmp_path):
    """Empty captions and broken pictures each get their reason; the others are all there."""
    whole = picture(5, "JPEG")
    source = shard(
        k001={**sample(1), "txt": b" \n"},
        k002={**sample(2), "png": picture(2)[:40]},
        k004={"jpg": whole[: len(whole) // 2], "txt": b"red"},
        k005={**sample(5), "png": b"no picture"},
        k006={**sample(6), "png": picture(6)},
    )
    texts = embed_shard(load_encoder(configs["t5"]), source, tmp_path / "t5.tar")
    assert texts.rejects == {"caption_empty": ["k001"]}
    images = embed_shard(load_encoder(configs["clip_image"]), source, tmp_path / "clip.tar")
    assert images.rejects == {
        "image_truncated": ["k002", "k004"],
        "image_undecodable": ["k005"],
    }
    assert (images.num_in, images.num_out) == (NUM_SAMPLES, NUM_SAMPLES - 3)
    assert len(embedded(tmp_path / "clip.tar")) == NUM_SAMPLES - 3
    small = embed_shard(
        load_encoder(configs["clip_image"]), shard(), tmp_path / "bomb.tar", max_pixels=80
    )
    assert small.num_out == 0
    assert len(small.rejects["image_bomb"]) == NUM_SAMPLES


def test_nan_and_inf_are_counted_and_kept_out(configs, shard, tmp_path, monkeypatch):
    """A caption whose states are not finite is rejected; its neighbours in the batch are not."""
    source = shard(k010={**sample(10), "txt": b"red poison"})
    encoder = load_encoder(configs["t5"])
    weights = encoder.network.get_input_embeddings().weight
    poison = encoder.tokenize(["poison"]).ids[0][0]
    monkeypatch.setattr(weights, "data", weights.data.clone())
    weights.data[poison] = torch.nan
    report = embed_shard(encoder, source, tmp_path / "out.tar")
    assert report.rejects == {"not_finite": ["k010"]}
    assert report.facts["num_nan"] > 0
    assert len(embedded(tmp_path / "out.tar")) == NUM_SAMPLES - 1


def test_int8_stores_a_byte_a_value_and_its_measured_error(configs, shard, tmp_path):
    """Tokens are int8 with a scale each, pooled stays bf16, and the receipt knows the error."""
    config = replace(configs["clip_text"], storage_dtype="int8")
    report = embed_shard(load_encoder(config), shard(), tmp_path / "int8.tar")
    embed_shard(load_encoder(configs["clip_text"]), shard(), tmp_path / "fp32.tar")
    exact = embedded(tmp_path / "fp32.tar")
    errors = []
    for key, tensors in embedded(tmp_path / "int8.tar").items():
        assert tensors["tokens"].dtype == torch.int8
        assert tensors["tokens_scale"].shape == tensors["tokens"].shape[:1]
        assert tensors["pooled"].dtype == torch.bfloat16
        read = dequantize(tensors)["tokens"].float()
        errors.append(1 - torch.cosine_similarity(read, exact[key]["tokens"], dim=-1).double())
    measured = torch.cat(errors)
    stated = report.facts["cosine_error"]
    assert stated["mean"] == pytest.approx(float(measured.mean()), rel=0.02)
    assert stated["max"] == pytest.approx(float(measured.max()), rel=0.05)
    assert 0 < stated["mean"] < stated["max"] < 1e-3


def test_padding_kept_is_stored_and_dropped_is_not(configs, shard, tmp_path):
    """`pad: keep` gives every sample max_tokens rows, of which the real ones are the same."""
    kept_config = replace(configs["t5"], pad="keep")
    embed_shard(load_encoder(kept_config), shard(), tmp_path / "keep.tar")
    embed_shard(load_encoder(configs["t5"]), shard(), tmp_path / "drop.tar")
    kept, dropped = embedded(tmp_path / "keep.tar"), embedded(tmp_path / "drop.tar")
    for key, tensors in dropped.items():
        assert len(kept[key]["tokens"]) == 12
        head = kept[key]["tokens"][: len(tensors["tokens"])]
        torch.testing.assert_close(head, tensors["tokens"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["t5", "clip_image"])
def test_timings_add_up(name, configs, shard, tmp_path):
    """Waiting and encoding are told apart, and the fractions are fractions."""
    timings = embed_shard(load_encoder(configs[name]), shard(), tmp_path / "out.tar").timings
    assert set(timings) == {
        *("decode_wait_s", "encode_s", "write_wait_s", "samples_per_s"),
        *("padding_waste_fraction", "device_idle_fraction"),
    }
    assert timings["encode_s"] > 0
    assert 0 <= timings["padding_waste_fraction"] < 1
    assert 0 <= timings["device_idle_fraction"] < 1
    total_s = NUM_SAMPLES / timings["samples_per_s"]
    assert timings["encode_s"] == pytest.approx(
        (1 - timings["device_idle_fraction"]) * total_s, rel=0.02, abs=1e-3
    )


def test_decoding_runs_ahead_by_a_bounded_window(configs, shard, tmp_path, monkeypatch):
    """However large the shard, only so many pictures are decoded and not yet encoded."""
    encoder = load_encoder(configs["clip_image"])
    monkeypatch.setattr(encoder, "batch_images", 4)
    ahead, most = 0, 0

    def prepare(picture, original=encoder.prepare):
        nonlocal ahead, most
        ahead += 1
        most = max(most, ahead)
        return original(picture)

    def encode(pictures, original=encoder.encode_pixels):
        nonlocal ahead
        ahead -= len(pictures)
        return original(pictures)

    monkeypatch.setattr(encoder, "prepare", prepare)
    monkeypatch.setattr(encoder, "encode_pixels", encode)
    embed_shard(encoder, shard(), tmp_path / "out.tar")
    assert ahead == 0
    assert most <= (embedding.MAX_DECODED_BATCHES + 1) * 4


@pytest.mark.parametrize("name", ["t5", "clip_image"])
def test_a_failure_on_the_way_leaves_nothing_behind(name, configs, shard, tmp_path, monkeypatch):
    """An error while packing is raised, and there is neither a tar nor a part of one."""

    def fail(tensors):
        raise OSError("disk full")

    source = shard()
    monkeypatch.setattr(embedding, "encode_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        embed_shard(load_encoder(configs[name]), source, tmp_path / "out.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["train.tar"]


def test_a_sample_without_its_member_is_an_error(configs, shard, tmp_path):
    """Ingested shards hold both; one that does not was not made by ingest."""
    source = shard(k001={"png": picture(1)})
    with pytest.raises(ShardError, match=r"train\.tar: sample 'k001' has no caption"):
        embed_shard(load_encoder(configs["t5"]), source, tmp_path / "out.tar")
    source = shard(k002={"txt": b"red"})
    with pytest.raises(ShardError, match=r"sample 'k002' has no image.*found txt"):
        embed_shard(load_encoder(configs["clip_image"]), source, tmp_path / "out.tar")
    source = shard(k003={"txt": b"\xff\xfe", "png": picture(3)})
    with pytest.raises(ShardError, match="caption of 'k003' is not UTF-8"):
        embed_shard(load_encoder(configs["t5"]), source, tmp_path / "out.tar")


def test_a_torn_shard_is_refused(configs, shard, tmp_path):
    """Nothing is made of half a tar."""
    source = shard()
    source.write_bytes(source.read_bytes()[:20480])
    with pytest.raises(ShardError):
        embed_shard(load_encoder(configs["t5"]), source, tmp_path / "out.tar")
    assert not (tmp_path / "out.tar").exists()
