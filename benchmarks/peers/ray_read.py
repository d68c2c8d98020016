"""Ray Data reading our own tars: four data sets zipped, pictures decoded by its tasks.

Rows keep their order, so `zip` joins what belongs together; the keys are compared all the same.
(`join` on the key would shuffle all rows through the object store; it was not measured.)
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.joined_data import (
    BATCH_SAMPLES,
    STREAMS,
    JoinedSample,
    collate,
    digest,
    measure,
)
from benchmarks.peers import serve


def main(action: str, folder: str, num_samples: int, num_workers: int) -> dict[str, Any]:
    """Read the content; `write` has nothing to do."""
    if action == "write":
        return {}
    os.environ.update({"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"})
    ray = importlib.import_module("ray")
    if not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=8,  # logical: four zipped reads on two have waited for each other for good
            include_dashboard=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
    batches = _batches(ray, Path(folder))
    return digest(batches) if action == "check" else measure(batches)


def _batches(ray: Any, folder: Path) -> Iterator[dict[str, Any]]:
    images, *caches = (
        ray.data.read_webdataset(sorted(str(path) for path in folder.glob(f"{name}/*.tar")))
        for name in ("images", *STREAMS)
    )
    joined = images
    for cache in caches:
        joined = joined.zip(cache)
    for batch in joined.iter_batches(batch_size=BATCH_SAMPLES, batch_format="pyarrow"):
        yield _collate(batch.to_pydict())


def _collate(batch: dict[str, list[Any]]) -> dict[str, Any]:
    load = importlib.import_module("safetensors.torch").load
    # zip gives the columns of the second, third and fourth data set a number behind their names
    keys = [batch[name] for name in ("__key__", "__key___1", "__key___2", "__key___3")]
    assert all(keys[0] == other for other in keys[1:])
    samples = []
    for row in range(len(keys[0])):
        t5, clip_text, clip_image = (
            load(batch[name][row]) for name in ("safetensors", "safetensors_1", "safetensors_2")
        )
        samples.append(
            JoinedSample(
                key=_text(keys[0][row]),
                caption=_text(batch["txt"][row]),
                image_CHW=torch.from_numpy(batch["png"][row].transpose(2, 0, 1).copy()),
                t5_TD=t5["tokens"],
                clip_text_TD=clip_text["tokens"],
                clip_text_D=clip_text["pooled"],
                clip_image_D=clip_image["pooled"],
            )
        )
    return collate(samples)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


if __name__ == "__main__":
    serve(main)
