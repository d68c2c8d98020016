"""How a worker that trains on CPUs runs fastest; it changes no result.

It has one thread for each of its CPUs: Ray sets OMP_NUM_THREADS by itself, unless the user has. And
it has another memory allocator than glibc's, which gives the pages of large tensors back to the
kernel and takes them anew at every step: a tenth of a small network's time. Pinning workers to
cores of their own was measured too, and did not help on a machine with nothing else to do.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.recipe_sections.resources import Resources


def training_environment(resources: Resources) -> dict[str, str]:
    """Variables for the processes of a unit that trains; none with GPUs.

    The allocator is the jemalloc that Ray brings along, at its own settings: told never to give
    memory back, it grew by a batch's activations at every step, to 20 GB in ten minutes. Where the
    user preloads something, or Ray has no jemalloc, as on macOS, nothing is set; a node without
    that file goes on with its own allocator.
    """
    import ray

    library = Path(ray.__file__).parent / "core" / "libjemalloc.so"
    if resources.gpus or "LD_PRELOAD" in os.environ or not library.exists():
        return {}
    return {"LD_PRELOAD": str(library)}
