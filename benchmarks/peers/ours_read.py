"""Our own side of the joined read, in a process of its own like the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.joined_data import (
    BATCH_SAMPLES,
    IMAGE_PX,
    STREAMS,
    JoinedSample,
    collate,
    content,
    digest,
    measure,
)
from benchmarks.peers import serve
from ediffi.loader import JoinedLoader
from ediffi.shards import (
    JoinedShards,
    Sample,
    ShardFile,
    ShardRef,
    ShardWriter,
    encode_tensors,
)
from ediffi.storage.tar_index import INDEX_SUFFIX, write_index

NUM_SHARDS = 8


def main(action: str, folder: str, num_samples: int, num_workers: int) -> dict[str, Any]:
    """Write the content, or read it."""
    torch.set_num_threads(1)
    root = Path(folder)
    if action == "write":
        write(root, num_samples)
        return {}
    refs = [
        ShardRef(
            name=path.name,
            images=shard_file(path),
            embeddings={name: shard_file(root / name / path.name) for name in STREAMS},
            num_samples=num_samples // NUM_SHARDS,
        )
        for path in sorted((root / "images").glob("*.tar"))
    ]
    loader = JoinedLoader(
        JoinedShards(refs, image_px=IMAGE_PX),
        collate=collate_samples,
        seed=1,
        batch_samples=BATCH_SAMPLES,
        num_workers=num_workers,
    )
    batches = _one_epoch(loader, num_samples)
    return digest(batches) if action == "check" else measure(batches)


def _one_epoch(loader: JoinedLoader[dict[str, Any]], num_samples: int) -> Iterator[dict[str, Any]]:
    """The batches of an epoch, the last one cut where the next epoch begins."""
    for batch in loader:
        rest = min(BATCH_SAMPLES, num_samples)
        num_samples -= rest
        yield {name: values[:rest] for name, values in batch.items()}


def shard_file(path: Path) -> ShardFile:
    """A tar as a receipt would describe it."""
    return ShardFile(path, path.stat().st_size, "", path.with_suffix(INDEX_SUFFIX))


def collate_samples(samples: Sequence[Sample]) -> dict[str, Any]:
    """Make the batch that every side makes."""
    return collate(
        [
            JoinedSample(
                key=sample.key,
                caption=sample.caption,
                image_CHW=sample.image,
                t5_TD=sample.streams["t5"]["tokens"],
                clip_text_TD=sample.streams["clip_text"]["tokens"],
                clip_text_D=sample.streams["clip_text"]["pooled"],
                clip_image_D=sample.streams["clip_image"]["pooled"],
            )
            for sample in samples
        ]
    )


def write(root: Path, num_samples: int) -> None:
    """Write the content as shards with their sidecars."""
    samples = content(num_samples)
    for shard_index in range(NUM_SHARDS):
        paths = {name: root / name / f"{shard_index:05d}.tar" for name in ("images", *STREAMS)}
        for path in paths.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        with (
            ShardWriter(paths["images"]) as images,
            ShardWriter(paths["t5"]) as t5,
            ShardWriter(paths["clip_text"]) as clip_text,
            ShardWriter(paths["clip_image"]) as clip_image,
        ):
            for _ in range(num_samples // NUM_SHARDS):
                sample, png = next(samples)
                images.write(sample.key, {"png": png, "txt": sample.caption.encode()})
                _put(t5, sample.key, tokens=sample.t5_TD)
                _put(clip_text, sample.key, tokens=sample.clip_text_TD, pooled=sample.clip_text_D)
                _put(clip_image, sample.key, pooled=sample.clip_image_D)
        for path in paths.values():
            write_index(path, path.with_suffix(INDEX_SUFFIX))


def _put(writer: ShardWriter, key: str, **tensors: torch.Tensor) -> None:
    writer.write(key, {"safetensors": encode_tensors(tensors)})


if __name__ == "__main__":
    serve(main)
