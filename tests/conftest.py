"""Set the environment before torch is first imported; skip what this machine cannot run."""

import os
from collections.abc import Sequence

import pytest

# One thread per process: the tests' tensors are too small to share out, and two threads on two busy
# cores stall. No test may reach a hub, a tracker or a telemetry server.
os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "WANDB_MODE": "disabled",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
)


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Skip `gpu` tests without a CUDA device; ask torch only if there is such a test."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
