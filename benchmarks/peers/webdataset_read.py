"""webdataset reading our own tars, the caches joined by `add_column` as its documentation shows.

It reads the very files that we read: each embedding tar is walked beside the pictures' tar, and
the keys are asserted to be equal.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.joined_data import (
    BATCH_SAMPLES,
    STREAMS,
    JoinedSample,
    collate,
    decode,
    digest,
    measure,
)
from benchmarks.peers import serve


def main(action: str, folder: str, num_samples: int, num_workers: int) -> dict[str, Any]:
    """Read the content; `write` has nothing to do."""
    if action == "write":
        return {}
    webdataset = importlib.import_module("webdataset")
    urls = sorted(str(path) for path in Path(folder).glob("images/*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=1, empty_check=False)
    for stream in STREAMS:
        dataset = dataset.compose(_AddColumn(stream))
    dataset = dataset.shuffle(1000).map(_decode).batched(BATCH_SAMPLES, collation_fn=collate)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=num_workers)
    return digest(loader) if action == "check" else measure(loader)


class _AddColumn:
    """Put another tar's member to every sample, read in step with the first tar."""

    def __init__(self, stream: str) -> None:
        self.stream = stream

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        webdataset = importlib.import_module("webdataset")
        last_url = None
        column: Iterator[dict[str, Any]] = iter(())
        for sample in samples:
            if sample["__url__"] != last_url:
                last_url = sample["__url__"]
                url = last_url.replace("/images/", f"/{self.stream}/")
                column = iter(
                    webdataset.WebDataset(
                        url,
                        shardshuffle=False,
                        empty_check=False,
                        workersplitter=_all_of_it,  # the first tar is this worker's already
                    )
                )
            extra = next(column)
            assert extra["__key__"] == sample["__key__"]
            sample[self.stream] = extra["safetensors"]
            yield sample


def _all_of_it(urls: Iterable[Any]) -> Iterable[Any]:
    return urls


def _decode(sample: dict[str, Any]) -> JoinedSample:
    load = importlib.import_module("safetensors.torch").load
    t5, clip_text, clip_image = (load(sample[stream]) for stream in STREAMS)
    return JoinedSample(
        key=sample["__key__"],
        caption=sample["txt"].decode(),
        image_CHW=decode(sample["png"]),
        t5_TD=t5["tokens"],
        clip_text_TD=clip_text["tokens"],
        clip_text_D=clip_text["pooled"],
        clip_image_D=clip_image["pooled"],
    )


if __name__ == "__main__":
    serve(main)
