"""mosaicml-streaming reading the joined content from MDS shards, as its documentation shows."""

from __future__ import annotations

import importlib
import shutil
from typing import Any

import numpy as np
import torch

from benchmarks.joined_data import (
    BATCH_SAMPLES,
    JoinedSample,
    collate,
    content,
    digest,
    measure,
    to_tensor,
)
from benchmarks.peers import serve

COLUMNS = {
    "key": "str",
    "caption": "str",
    "image": "png",
    "t5": "ndarray:uint16",  # MDS knows no bf16: the same bits under another name
    "clip_text": "ndarray:uint16",
    "clip_text_pooled": "ndarray:uint16",
    "clip_image_pooled": "ndarray:uint16",
}


def main(action: str, folder: str, num_samples: int, num_workers: int) -> dict[str, Any]:
    """Write the content, or read it."""
    if action == "write":
        return _write(folder, num_samples)
    streaming = importlib.import_module("streaming")
    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(
        local=folder, shuffle=True, shuffle_seed=1, batch_size=BATCH_SAMPLES
    )
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=BATCH_SAMPLES, num_workers=num_workers, collate_fn=_collate
    )
    return digest(loader) if action == "check" else measure(loader)


def _write(folder: str, num_samples: int) -> dict[str, Any]:
    pil = importlib.import_module("PIL.Image")
    streaming = importlib.import_module("streaming")
    shutil.rmtree(folder, ignore_errors=True)
    with streaming.MDSWriter(out=folder, columns=COLUMNS) as writer:
        for sample, _ in content(num_samples):
            writer.write(
                {
                    "key": sample.key,
                    "caption": sample.caption,
                    "image": pil.fromarray(sample.image_CHW.permute(1, 2, 0).numpy()),
                    "t5": _bits(sample.t5_TD),
                    "clip_text": _bits(sample.clip_text_TD),
                    "clip_text_pooled": _bits(sample.clip_text_D),
                    "clip_image_pooled": _bits(sample.clip_image_D),
                }
            )
    return {}


def _bits(tensor: torch.Tensor) -> Any:
    return tensor.view(torch.int16).numpy().view(np.uint16)


def _tensor(bits: Any) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return collate(
        [
            JoinedSample(
                key=sample["key"],
                caption=sample["caption"],
                image_CHW=to_tensor(sample["image"]),
                t5_TD=_tensor(sample["t5"]),
                clip_text_TD=_tensor(sample["clip_text"]),
                clip_text_D=_tensor(sample["clip_text_pooled"]),
                clip_image_D=_tensor(sample["clip_image_pooled"]),
            )
            for sample in samples
        ]
    )


if __name__ == "__main__":
    serve(main)
