"""One start of our loader at one position, for `benchmarks.resume_position`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.joined_data import IMAGE_PX, STREAMS
from benchmarks.peers import ours_read, serve
from benchmarks.resume_position import SHARD_SAMPLES
from ediffi.loader import JoinedLoader
from ediffi.shards import JoinedShards, ShardRef


def main(action: str, folder: str, num_shards: int, position: int) -> dict[str, Any]:
    """Write the tars once, or time one start."""
    torch.set_num_threads(1)
    root = Path(folder)
    if action == "write":
        if not root.joinpath("images").exists():
            ours_read.write(root, ours_read.NUM_SHARDS * SHARD_SAMPLES)
        return {}
    refs = _refs(root, num_shards)
    started_s = time.perf_counter()
    loader = JoinedLoader(
        JoinedShards(refs, image_px=IMAGE_PX),
        collate=ours_read.collate_samples,
        seed=1,
        batch_samples=64,
        num_workers=2,
    )
    opened_s = time.perf_counter()
    loader.load_state_dict(loader.state_dict() | {"num_yielded": position})
    next(iter(loader))
    return {"seconds": time.perf_counter() - started_s, "opening_s": opened_s - started_s}


def _refs(root: Path, num_shards: int) -> list[ShardRef]:
    files = [
        {
            name: ours_read.shard_file(root / name / f"{index:05d}.tar")
            for name in ("images", *STREAMS)
        }
        for index in range(ours_read.NUM_SHARDS)
    ]
    return [
        ShardRef(
            name=f"{index:06d}.tar",
            images=files[index % len(files)]["images"],
            embeddings={name: files[index % len(files)][name] for name in STREAMS},
            num_samples=SHARD_SAMPLES,
        )
        for index in range(num_shards)
    ]


if __name__ == "__main__":
    serve(main)
