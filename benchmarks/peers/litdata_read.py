"""LitData reading the joined content from its optimized chunks, as its documentation shows."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.joined_data import (
    BATCH_SAMPLES,
    JoinedSample,
    collate,
    content,
    decode,
    digest,
    measure,
)
from benchmarks.peers import serve


def main(action: str, folder: str, num_samples: int, num_workers: int) -> dict[str, Any]:
    """Write the content, or read it."""
    litdata = importlib.import_module("litdata")
    if action == "write":
        shutil.rmtree(folder, ignore_errors=True)
        litdata.optimize(
            fn=_samples,
            inputs=[num_samples],
            output_dir=folder,
            chunk_bytes="64MB",
            num_workers=1,
        )
        return {}
    dataset = litdata.StreamingDataset(folder, shuffle=True, seed=1)
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=BATCH_SAMPLES, num_workers=num_workers, collate_fn=_collate
    )
    return digest(loader) if action == "check" else measure(loader)


def _samples(num_samples: int) -> Iterator[dict[str, Any]]:
    for sample, png in content(num_samples):
        yield {
            "key": sample.key,
            "caption": sample.caption,
            "image": png,
            "t5": sample.t5_TD.view(torch.int16),
            "clip_text": sample.clip_text_TD.view(torch.int16),
            "clip_text_pooled": sample.clip_text_D.view(torch.int16),
            "clip_image_pooled": sample.clip_image_D.view(torch.int16),
        }


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return collate(
        [
            JoinedSample(
                key=sample["key"],
                caption=sample["caption"],
                image_CHW=decode(sample["image"]),
                t5_TD=sample["t5"].view(torch.bfloat16),
                clip_text_TD=sample["clip_text"].view(torch.bfloat16),
                clip_text_D=sample["clip_text_pooled"].view(torch.bfloat16),
                clip_image_D=sample["clip_image_pooled"].view(torch.bfloat16),
            )
            for sample in samples
        ]
    )


if __name__ == "__main__":
    serve(main)
