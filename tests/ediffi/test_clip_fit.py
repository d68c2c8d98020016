"""Fitting a small CLIP."""

import itertools
import json
import math
from dataclasses import replace

import open_clip
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch.nn import functional as F

from ediffi.clip_fit import ClipFitConfig, contrastive_loss, fit_clip
from ediffi.encoders import EncoderConfig, load_encoder

CONFIG = ClipFitConfig(
    image_px=16, width=32, num_layers=2, embedding_width=32, num_steps=160, batch_images=48, lr=4e-3
)


def shape_samples(num_each: int) -> list[tuple[Image.Image, str]]:
    """Pictures of one coloured shape on white, `num_each` for each of 12 captions."""
    samples = []
    for colour, shape, side in itertools.product(
        ("red", "green", "blue"), ("circle", "bar"), ("left", "right")
    ):
        for i in range(num_each):
            picture = Image.new("RGB", (16, 16), "white")
            x, y = (1 if side == "left" else 9) + i % 2, 3 + i % 3
            draw = ImageDraw.Draw(picture)
            if shape == "circle":
                draw.ellipse((x, y, x + 5, y + 5), fill=colour)
            else:
                draw.rectangle((x + 2, y - 2, x + 3, y + 7), fill=colour)
            samples.append((picture, f"a {colour} {shape} on the {side}"))
    return samples


def test_fitting_aligns_pictures_with_their_captions(tmp_path):
    """After a short fit every picture finds its caption, also through the encoders."""
    rows: list[dict[str, float]] = []
    samples = shape_samples(6)
    metrics = fit_clip(samples, CONFIG, tmp_path, rows.append)
    assert metrics["image_to_text_accuracy"] > 0.95
    assert metrics["text_to_image_accuracy"] > 0.95
    assert [row["images"] for row in rows] == [48.0 * step for step in range(8, 161, 8)]
    assert rows[-1]["loss"] == metrics["loss"] < rows[0]["loss"]

    captions = sorted({caption for _, caption in samples})
    text, image = (
        load_encoder(EncoderConfig(family=family, weights=str(tmp_path), storage_dtype="fp32"))
        for family in ("open_clip_text", "open_clip_image")
    )
    text_UD = torch.stack([sample["pooled"] for sample in text.encode(captions)])
    image_ND = torch.stack([s["pooled"] for s in image.encode([picture for picture, _ in samples])])
    own_N = torch.tensor([captions.index(caption) for _, caption in samples])
    accuracy = ((image_ND @ text_UD.T).argmax(1) == own_N).float().mean().item()
    assert accuracy == pytest.approx(metrics["image_to_text_accuracy"])


def test_equal_seeds_give_equal_bytes(tmp_path):
    """Two fits agree byte for byte, another seed does not, and global randomness is untouched."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    state = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = replace(CONFIG, num_steps=3, seed=seed)
        fit_clip(shape_samples(2), config, tmp_path / name, lambda row: None)
    torch.set_num_threads(threads)
    a, b, c = (
        [path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in "abc"
    )
    assert a == b != c
    assert torch.equal(state, torch.random.get_rng_state())


def test_only_tokens_that_occur_are_trained(tmp_path):
    """Embedding rows of captions' tokens move; all others keep their initial values."""
    tables = []
    for num_steps in (1, 3):
        directory = tmp_path / str(num_steps)
        fit_clip(
            shape_samples(1), replace(CONFIG, num_steps=num_steps), directory, lambda row: None
        )
        state = load_file(directory / "open_clip_model.safetensors")
        tables.append(state["token_embedding.weight"])
    moved = (tables[0] != tables[1]).any(1)
    tokenizer = open_clip.SimpleTokenizer()
    end, start = tokenizer.eot_token_id, tokenizer.sot_token_id
    words = {token for _, caption in shape_samples(1) for token in tokenizer.encode(caption)}
    assert moved.sum() <= len(words) + 3  # start, end and padding
    assert moved[[*words, start, end]].all()


def test_the_directory_is_open_clips_own_format(tmp_path):
    """open_clip itself loads it, picture transform included."""
    fit_clip(shape_samples(1), replace(CONFIG, num_steps=1), tmp_path, lambda row: None)
    network, transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    assert isinstance(network, open_clip.CLIP)
    assert transform(Image.new("RGB", (40, 30))).shape == (3, 16, 16)
    document = json.loads((tmp_path / "open_clip_config.json").read_text())
    assert document["model_cfg"] == CONFIG.model_json()


def test_loss_of_distinct_captions_is_clips_own():
    """Without repeats the loss equals open_clip's ClipLoss."""
    torch.manual_seed(0)
    image_BD, text_BD = (F.normalize(torch.randn(5, 8), dim=-1) for _ in range(2))
    ours = contrastive_loss(image_BD, text_BD, torch.arange(5), torch.tensor(7.0))
    torch.testing.assert_close(ours, open_clip.ClipLoss()(image_BD, text_BD, torch.tensor(7.0)))


def test_pictures_of_one_caption_are_not_negatives_of_each_other():
    """Perfectly aligned repeats reach the floor of the loss: half the mean log of the repeats."""
    text_UD = torch.eye(2)
    index_B = torch.tensor([0, 0, 1])
    loss = contrastive_loss(text_UD[index_B], text_UD, index_B, torch.tensor(100.0))
    torch.testing.assert_close(loss, torch.tensor(math.log(2) / 4))


def test_one_caption_cannot_be_contrasted(tmp_path):
    """A set with a single caption is refused before anything is trained."""
    samples = [(Image.new("RGB", (16, 16)), "a dot")] * 3
    with pytest.raises(ValueError, match="at least two distinct captions, got 1"):
        fit_clip(samples, CONFIG, tmp_path, lambda row: None)


@pytest.mark.parametrize(
    ("field", "value"),
    [("width", 40), ("num_patches", 5), ("batch_images", 1), ("num_steps", 0), ("lr", 0.0)],
)
def test_config_errors_name_the_field(field, value):
    """Each invalid value is refused with the field's name."""
    with pytest.raises(ValueError, match=f"^{field} must"):
        replace(CONFIG, **{field: value})
