"""The three encoders under Ray Data, as its documentation shows: read, map, map_batches, write.

Pictures are decoded and resized by tasks, one actor keeps the networks; captions are padded to the
longest of each batch for T5, and to the full context for CLIP, as open_clip's own functions do. Two
CPUs: one for the actor, one for the tasks. The clock runs from the actor's first batch to its last,
so that neither the start of the actor nor the writing of the last block counts.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.embed_content import Folders
from benchmarks.peers import serve

BATCH_SAMPLES = 64


def main(folder: str) -> dict[str, Any]:
    """Encode every shard with all three encoders; the seconds between first and last batch."""
    os.environ.update({"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"})
    ray = importlib.import_module("ray")
    if not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
    folders = Folders(root=Path(folder))
    tars = sorted(str(path) for path in folders.shards.glob("*.tar"))
    with tempfile.TemporaryDirectory(prefix="ray-embed-") as output:
        rows = ray.data.read_webdataset(tars).map(_prepare, num_cpus=0.5)
        encoded = rows.map_batches(
            _Encoders,
            fn_constructor_args=(str(folders.t5), str(folders.clip)),
            batch_size=BATCH_SAMPLES,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=1,
        )
        encoded.write_parquet(output)
        times = ray.data.read_parquet(output, columns=["began", "ended"]).to_pandas()
    return {"seconds": float(times["ended"].max() - times["began"].min())}


def _prepare(row: dict[str, Any]) -> dict[str, Any]:
    """Resize and normalise one picture, which the reader has decoded."""
    import open_clip
    from PIL import Image

    transform = vars(_prepare).setdefault(
        "transform", open_clip.image_transform(224, is_train=False)
    )
    return {
        "key": row["__key__"],
        "caption": str(row["txt"]),
        "x_CHW": transform(Image.fromarray(row["jpg"])).numpy(),
    }


class _Encoders:
    """T5 and both towers of CLIP, warm in an actor."""

    def __init__(self, t5: str, clip: str) -> None:
        import open_clip
        import torch
        from transformers import AutoTokenizer, T5EncoderModel

        torch.set_num_threads(1)
        self.t5_tokenizer = AutoTokenizer.from_pretrained(t5)
        self.t5 = T5EncoderModel.from_pretrained(t5).eval()
        self.clip, _ = open_clip.create_model_from_pretrained(f"local-dir:{clip}")
        self.clip.eval()
        self.clip_tokenizer = open_clip.get_tokenizer(f"local-dir:{clip}")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import torch

        began = time.time()
        texts = list(batch["caption"])
        with torch.inference_mode():
            t5 = self.t5_tokenizer(texts, padding=True, return_tensors="pt")
            t5_BTD = self.t5(**t5).last_hidden_state.bfloat16()
            found = self.clip.forward_intermediates(
                image=torch.from_numpy(batch["x_CHW"]),
                text=self.clip_tokenizer(texts),
                image_indices=1,
                text_indices=1,
                normalize_intermediates=True,
            )
        lengths = t5["attention_mask"].sum(1).tolist()
        clip_BTD = found["text_intermediates"][-1].bfloat16()
        ends = [int(ids.argmax()) + 1 for ids in self.clip_tokenizer(texts)]
        return {
            "key": batch["key"],
            "t5": [_bytes(x_TD[:n]) for x_TD, n in zip(t5_BTD, lengths)],
            "clip_text": [_bytes(x_TD[:n]) for x_TD, n in zip(clip_BTD, ends)],
            "clip_text_pooled": [_bytes(x_D.bfloat16()) for x_D in found["text_features"]],
            "clip_image_pooled": [_bytes(x_D.bfloat16()) for x_D in found["image_features"]],
            "began": [began] * len(texts),
            "ended": [time.time()] * len(texts),
        }


def _bytes(tensor: Any) -> bytes:
    import torch

    data: bytes = tensor.contiguous().view(torch.int16).numpy().tobytes()
    return data


if __name__ == "__main__":
    serve(main)
