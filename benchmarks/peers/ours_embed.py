"""Our side of `benchmarks.embed_throughput`: the real stage, and a bare loop over its networks."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.embed_content import Folders
from benchmarks.peers import serve
from ediffi.encoders import ImageEncoder, TextEncoder, load_encoder, token_batches
from ediffi.pictures import decode_image
from ediffi.storage.shard_format import read_shard
from pipelines.recipe import Encoder
from pipelines.stage import Manifest, Workspace
from pipelines.stages.embed import Embed
from pipelines.stages.inputs import NULL_UNIT, encoder_config


def main(action: str, folder: str, stream: str) -> dict[str, Any]:
    """Encode every shard with one encoder: `ours` through the stage, `bare` as forward passes."""
    stage = _stage(folder, stream)
    inputs = {"ingest": Manifest.load(Folders(root=Path(folder)).shards)}
    if action == "ours":
        seconds = sum(_run(stage, unit, inputs) for unit in stage.plan(inputs))
        return {"seconds": seconds}
    forward = _bare(folder, stream)
    start = time.perf_counter()
    forward()
    return {"seconds": time.perf_counter() - start}


def _stage(folder: str, stream: str) -> Embed:
    folders = Folders(root=Path(folder))
    encoder = {
        "t5": Encoder(family="transformers", weights=str(folders.t5)),
        "clip_text": Encoder(family="open_clip_text", weights=str(folders.clip)),
        "clip_image": Encoder(family="open_clip_image", weights=str(folders.clip)),
    }[stream]
    return Embed(encoder_name=stream, encoder=encoder)


def _run(stage: Embed, unit: Any, inputs: dict[str, Manifest]) -> float:
    """Seconds of one unit; the null unit, which comes first, loads the encoder and is free."""
    with tempfile.TemporaryDirectory(prefix="ediffi-embed-") as scratch:
        workspace = Workspace(scratch=Path(scratch), durable=Path(scratch), inputs=inputs)
        start = time.perf_counter()
        stage.run(unit, workspace)
        return 0.0 if unit.id == NULL_UNIT else time.perf_counter() - start


@cache
def _bare(folder: str, stream: str) -> Callable[[], None]:
    """The very batches that the stage would make, tokenized or decoded beforehand."""
    encoder = load_encoder(encoder_config(_stage(folder, stream).encoder, {}))
    passes: list[Callable[[], Any]] = []
    for tar in sorted(Folders(root=Path(folder)).shards.glob("*.tar")):
        samples = [members for _, members in read_shard(tar)]
        if isinstance(encoder, TextEncoder):
            passes += _text_passes(encoder, [members["txt"].decode() for members in samples])
        else:
            assert isinstance(encoder, ImageEncoder)
            pictures = [encoder.prepare(decode_image(members["jpg"])) for members in samples]
            passes += _image_passes(encoder, pictures)

    def forward() -> None:
        with torch.inference_mode():
            for one in passes:
                one()

    return forward


def _text_passes(encoder: TextEncoder, captions: list[str]) -> list[Callable[[], Any]]:
    passes: list[Callable[[], Any]] = []
    ids = encoder.tokenize(captions).ids
    for batch in token_batches([len(row) for row in ids], encoder.batch_tokens):
        longest = max(len(ids[i]) for i in batch)
        ids_BT = torch.full((len(batch), longest), encoder.pad_id)
        mask_BT = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, i in enumerate(batch):
            ids_BT[row, : len(ids[i])] = torch.tensor(ids[i])
            mask_BT[row, : len(ids[i])] = 1
        passes.append(partial(encoder._forward, ids_BT, mask_BT))
    return passes


def _image_passes(encoder: ImageEncoder, pictures: list[torch.Tensor]) -> list[Callable[[], Any]]:
    starts = range(0, len(pictures), encoder.batch_images)
    batches = [torch.stack(pictures[i : i + encoder.batch_images]) for i in starts]
    return [partial(encoder._forward, x_BCHW) for x_BCHW in batches]


if __name__ == "__main__":
    serve(main)
