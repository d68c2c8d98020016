"""Ragged T5 caches against padded ones: `python -m benchmarks.t5_ragged [--quick] [--json FILE]`.

The other side is the usual recipe for precomputing T5, written out: captions padded to 113 tokens
(the longest that the eDiff-I paper's T5 takes), in batches of 64 in the order of the shard, every
state stored. Both sides run the same network in one process and one thread, store bf16 as
safetensors in a tar, and start from the same tar of captions. Before anything is timed, all real
tokens are compared in fp32: a difference beyond TOLERANCE is an error.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.embed_content import captions, write_t5
from benchmarks.interleave import our_versions, row, write_rows
from benchmarks.report import Row
from ediffi.encoders import load_encoder
from ediffi.encoding.embedding import embed_shard
from ediffi.encoding.encoder_weights import EncoderConfig
from ediffi.storage.shard_format import (
    ShardWriter,
    caption_of,
    decode_tensors,
    encode_tensors,
    read_shard,
)

PADDED_TOKENS = 113
BATCH_CAPTIONS = 64
TOLERANCE = 1e-4  # largest difference of a state, in fp32; the states' standard deviation is 1
COMMAND = "python -m benchmarks.t5_ragged"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the rows; `--json` writes them to a file."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--quick", action="store_true", help="128 captions, one run: a smoke test")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    num_captions, runs = (128, 1) if options.quick else (512, options.runs)
    with TemporaryDirectory(prefix="ediffi-t5-ragged-") as folder:
        rows = measure_all(Path(folder), num_captions, runs)
    write_rows(rows, options.json)
    return 0


def measure_all(folder: Path, num_captions: int, runs: int) -> list[Row]:
    """Both sides in turn, `runs` times."""
    write_t5(folder / "t5")
    shard = folder / "train.tar"
    with ShardWriter(shard) as writer:
        for index, caption in enumerate(captions(num_captions)):
            writer.write(f"{index:08d}", {"txt": caption.encode()})
    largest = _compare(folder, shard)
    print(f"real tokens differ by at most {largest:.1e}", file=sys.stderr)
    ours: list[float] = []
    padded: list[float] = []
    sides = [(ours, _ragged), (padded, _padded)]
    for run_index in range(runs):
        for seconds, side in sides if run_index % 2 else reversed(sides):
            start = time.perf_counter()
            side(folder, shard, "bf16")
            seconds.append(time.perf_counter() - start)
        print(f"ours {ours[-1]:6.2f} s, padded {padded[-1]:6.2f} s", file=sys.stderr)
    about: dict[str, Any] = {
        "other_name": f"padded to {PADDED_TOKENS}",
        "command": COMMAND,
        "versions": our_versions("torch", "transformers"),
    }
    sizes = {name: (folder / f"{name}-bf16.tar").stat().st_size for name in ("ragged", "padded")}
    return [
        row(
            f"T5 captions, real tokens equal to {TOLERANCE:g}",
            "captions/s",
            [num_captions / taken for taken in ours],
            [num_captions / taken for taken in padded],
            better="higher",
            **about,
        ),
        row(
            "T5 cache",
            "bytes/caption",
            [sizes["ragged"] / num_captions] * runs,
            [sizes["padded"] / num_captions] * runs,
            better="lower",
            **about,
        ),
    ]


def _config(folder: Path, storage_dtype: Any) -> EncoderConfig:
    return EncoderConfig(
        family="transformers",
        weights=str(folder / "t5"),
        max_tokens=PADDED_TOKENS,
        storage_dtype=storage_dtype,
    )


def _ragged(folder: Path, shard: Path, storage_dtype: str) -> Path:
    target = folder / f"ragged-{storage_dtype}.tar"
    embed_shard(load_encoder(_config(folder, storage_dtype)), shard, target)
    return target


def _padded(folder: Path, shard: Path, storage_dtype: str) -> Path:
    """The usual recipe: every caption becomes PADDED_TOKENS states."""
    target = folder / f"padded-{storage_dtype}.tar"
    encoder: Any = load_encoder(_config(folder, storage_dtype))
    dtype = torch.float32 if storage_dtype == "fp32" else torch.bfloat16
    with ShardWriter(target) as writer, torch.inference_mode():
        for keys, texts in _batches(shard):
            inputs = encoder.tokenizer(
                texts,
                padding="max_length",
                max_length=PADDED_TOKENS,
                truncation=True,
                return_tensors="pt",
            )
            states_BTD = encoder.network(**inputs).last_hidden_state.to(dtype)
            for key, states_TD in zip(keys, states_BTD):
                writer.write(key, {"safetensors": encode_tensors({"tokens": states_TD})})
    return target


def _batches(shard: Path) -> Iterator[tuple[list[str], list[str]]]:
    samples = [(key, caption_of(members)) for key, members in read_shard(shard)]
    for start in range(0, len(samples), BATCH_CAPTIONS):
        keys, texts = zip(*samples[start : start + BATCH_CAPTIONS])
        yield list(keys), list(texts)


def _compare(folder: Path, shard: Path) -> float:
    """Largest difference between the two caches, on real tokens. Raises ValueError beyond it."""
    ragged, padded = (_read(side(folder, shard, "fp32")) for side in (_ragged, _padded))
    largest = 0.0
    for (key, real_TD), (other_key, all_TD) in zip(ragged, padded, strict=True):
        if key != other_key:
            raise ValueError(f"the caches must hold the same keys, found {key} and {other_key}")
        largest = max(largest, float((real_TD - all_TD[: len(real_TD)]).abs().max()))
    if largest > TOLERANCE:
        raise ValueError(f"real tokens must agree to {TOLERANCE:g}, they differ by {largest:g}")
    return largest


def _read(tar: Path) -> Iterator[tuple[str, Tensor]]:
    for key, members in read_shard(tar):
        yield key, decode_tensors(members["safetensors"])["tokens"]


if __name__ == "__main__":
    sys.exit(main())
