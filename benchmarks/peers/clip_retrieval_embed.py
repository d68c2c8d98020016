"""clip-retrieval's inference worker over our tars, with the same CLIP as ours.

Its command fetches a model by name; here the loader it calls hands out the CLIP of the benchmark.
Packages that its `__init__` and mapper import for other purposes are stood in for, and its logger,
which starts another interpreter, is left out. Everything that is timed (reader, mapper, writer,
runner) is its own code, unchanged.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
import types
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.embed_content import Folders
from benchmarks.peers import serve


def main(folder: str, num_prepro_workers: int) -> dict[str, Any]:
    """Encode every shard: pooled text and image vectors."""
    worker = _worker(folder)
    tars = sorted(str(path) for path in Folders(root=Path(folder)).shards.glob("*.tar"))
    with tempfile.TemporaryDirectory(prefix="clip-retrieval-") as output:
        start = time.perf_counter()
        worker.worker(
            tasks=[0],
            input_dataset=tars,
            output_folder=output,
            output_partition_count=1,
            input_format="webdataset",
            batch_size=64,
            num_prepro_workers=num_prepro_workers,
            enable_metadata=False,
        )
        return {"seconds": time.perf_counter() - start}


@cache
def _worker(folder: str) -> Any:
    import open_clip

    name = f"local-dir:{Folders(root=Path(folder)).clip}"
    network, preprocess = open_clip.create_model_from_pretrained(name)
    tokenizer = open_clip.get_tokenizer(name)

    def load_clip(**_: Any) -> tuple[Any, Any, Any]:
        return network.eval(), preprocess, tokenizer

    _stand_in("all_clip", load_clip=load_clip)
    _stand_in("sentence_transformers", SentenceTransformer=None)
    _stand_in("wandb")  # of the logger
    spec = find_spec("clip_retrieval")
    assert spec is not None
    for package in ("clip_retrieval", "clip_retrieval.clip_inference"):
        bare = types.ModuleType(package)  # without its __init__, which imports a web server
        inner = package.split(".")[1:]
        assert spec.submodule_search_locations is not None
        bare.__path__ = [str(Path(spec.submodule_search_locations[0]).joinpath(*inner))]
        sys.modules[package] = bare
    worker: Any = importlib.import_module("clip_retrieval.clip_inference.worker")
    worker.LoggerWriter = _NoLogger
    return worker


class _NoLogger:
    def __init__(self, **_: Any) -> None:
        """Nothing to set up."""

    def start(self) -> None:
        """Nothing to start."""

    def __call__(self, row: dict[str, float]) -> None:
        """Say nothing."""

    def end(self) -> None:
        """Nothing to end."""


def _stand_in(name: str, **attributes: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


if __name__ == "__main__":
    serve(main)
