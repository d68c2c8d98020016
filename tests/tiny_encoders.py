"""Random encoders on disk, small enough to load and run in milliseconds."""

from pathlib import Path

VOCABULARY = ("<pad>", "</s>", "<unk>", "▁")


def write_t5(directory: Path, words: tuple[str, ...], *, seed: int = 0) -> None:
    """A two-layer T5 encoder of width 16; the tokenizer knows `words` and ends in </s>."""
    import torch
    from transformers import T5Config, T5EncoderModel

    write_tokenizer(directory, words)
    torch.manual_seed(seed)
    size = len(VOCABULARY) + len(words)
    architecture = T5Config(vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    T5EncoderModel(architecture).save_pretrained(directory)


def write_tokenizer(directory: Path, words: tuple[str, ...]) -> None:
    """The tokenizer alone: a Unigram over whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = [*VOCABULARY, *("▁" + word for word in words)]
    tokenizer = Tokenizer(models.Unigram([(token, -1.0) for token in tokens], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)


def write_clip(directory: Path) -> None:
    """A one-layer CLIP for 8 px pictures, hardly fitted."""
    from PIL import Image

    from ediffi.clip_fit import ClipFitConfig, fit_clip

    samples = [(Image.new("RGB", (8, 8), name), name) for name in ("red", "green", "blue")]
    config = ClipFitConfig(image_px=8, width=32, num_layers=1, embedding_width=16, num_steps=2)
    directory.mkdir(parents=True, exist_ok=True)
    fit_clip(samples, config, directory, report=lambda row: None)
