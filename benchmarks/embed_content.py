"""What the embedding benchmarks encode, and with what: the same every time, and nothing downloaded.

Captions are as long as those of COCO: 13 tokens in the median, seldom above 25. Pictures are 256 px
JPEGs. The encoders have seeded random weights in the sizes of T5 v1.1 small (8 blocks, width 512)
and of open_clip's ViT-S-32; which weights they are changes no speed.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ARCHITECTURE = "ViT-S-32"
PICTURE_PX = 256
_COARSE_PX = 32  # pictures are upscaled noise: as hard to decode as photographs
_MEDIAN_TOKENS, _LOG_STD = 13, 0.22
_SHORTEST_TOKENS, _LONGEST_TOKENS = 6, 60
# One token each for CLIP, and for the T5 made here.
# fmt: off
WORDS = (
    "a", "the", "man", "woman", "people", "person", "dog", "cat", "bird", "horse", "train", "bus",
    "car", "street", "table", "plate", "food", "pizza", "cake", "water", "beach", "wave", "field",
    "grass", "tree", "snow", "board", "ball", "tennis", "baseball", "game", "player", "room",
    "kitchen", "bed", "chair", "window", "clock", "sign", "light", "building", "city", "sky",
    "air", "park", "bench", "boat", "bike", "truck", "red", "white", "black", "blue", "green",
    "brown", "small", "large", "young", "old", "two", "three", "group", "sitting", "standing",
    "holding", "riding", "playing", "walking", "looking", "eating", "of", "on", "in", "with",
    "next", "to", "near", "front", "top", "and",
)
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where everything lies."""

    root: Path

    @property
    def t5(self) -> Path:
        return self.root / "t5"

    @property
    def clip(self) -> Path:
        return self.root / "clip"

    @property
    def shards(self) -> Path:
        return self.root / "shards"


def captions(num_samples: int) -> Iterator[str]:
    """Captions whose lengths follow a log-normal law."""
    draw = np.random.default_rng(0)
    for _ in range(num_samples):
        tokens = round(draw.lognormal(math.log(_MEDIAN_TOKENS), _LOG_STD))
        num_words = min(max(tokens, _SHORTEST_TOKENS), _LONGEST_TOKENS) - 1  # T5 adds </s>
        yield " ".join(WORDS[i] for i in draw.integers(len(WORDS), size=num_words))


def write_all(folders: Folders, *, num_samples: int, shard_samples: int) -> None:
    """Write the encoders and the shards, the latter as a finished `ingest` stage."""
    write_t5(folders.t5)
    write_clip(folders.clip)
    _write_shards(folders.shards, num_samples, shard_samples)


def write_t5(folder: Path) -> None:
    """A T5 encoder with a tokenizer over WORDS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    vocabulary = ["<pad>", "</s>", "<unk>", "▁", *("▁" + word for word in WORDS)]
    tokenizer = Tokenizer(models.Unigram([(token, -1.0) for token in vocabulary], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    small = T5Config(
        vocab_size=len(vocabulary),
        d_model=512,
        d_kv=64,
        d_ff=1024,
        num_layers=8,
        num_heads=6,
        feed_forward_proj="gated-gelu",
    )
    T5EncoderModel(small).save_pretrained(folder)


def write_clip(folder: Path) -> None:
    """A CLIP of open_clip's own architecture."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = open_clip.get_model_config(ARCHITECTURE)
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    description = {"model_cfg": config, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(description))


def _write_shards(folder: Path, num_samples: int, shard_samples: int) -> None:
    from ediffi.storage.shard_format import ShardWriter
    from ediffi.storage.tar_index import write_index
    from pipelines.stages.ingestion.shard_digests import ShardDigests

    folder.mkdir(parents=True, exist_ok=True)
    texts = list(captions(num_samples))
    receipts = []
    for number, start in enumerate(range(0, num_samples, shard_samples)):
        tar, digests = folder / f"train-{number:05d}.tar", ShardDigests()
        part = texts[start : start + shard_samples]
        with ShardWriter(tar) as writer:
            for index, text in enumerate(part, start):
                picture = _picture(index)
                writer.write(f"{index:08d}", {"jpg": picture, "txt": text.encode()})
                digests.add(f"{index:08d}", text.encode(), picture)
        write_index(tar, tar.with_suffix(".index.json"))
        receipts.append(_receipt(tar, len(part), digests.facts()))
    _complete(folder, receipts)


def _receipt(tar: Path, num_samples: int, digests: dict[str, str]) -> Any:
    from pipelines.stage import File, Receipt

    files = tuple(
        File(
            path=path.name,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            num_bytes=path.stat().st_size,
        )
        for path in (tar, tar.with_suffix(".index.json"))
    )
    facts = {"split": "train", "shard": tar.name, "digests": digests}
    return Receipt(
        unit=tar.stem,
        files=files,
        num_in=num_samples,
        num_out=num_samples,
        rejects={},
        facts=facts,
    )


def _complete(folder: Path, receipts: list[Any]) -> None:
    from pipelines.store.stage_record import StageRecord

    (folder / "receipts").mkdir(exist_ok=True)
    for receipt in receipts:
        path = folder / "receipts" / f"{receipt.unit}.json"
        path.write_text(json.dumps(receipt.to_json()))
    units = [receipt.unit for receipt in receipts]
    StageRecord(folder).complete("ingest", {}, {}, {}, units, "benchmark")


def _picture(index: int) -> bytes:
    from PIL import Image

    noise = np.random.default_rng(index).integers(0, 256, (_COARSE_PX, _COARSE_PX, 3), np.uint8)
    picture = Image.fromarray(noise).resize((PICTURE_PX, PICTURE_PX), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=90)
    return stream.getvalue()
