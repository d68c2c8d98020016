"""Set the environment before torch is first imported; skip what this machine cannot run."""

import os
import signal
import uuid
from collections.abc import Iterator, Sequence

import pytest

from tests.infra.ports import free_port

S3_PORT = free_port()

# A shell lets what it starts in the background ignore Ctrl-C, which tests send to themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

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
        # Workers of a Ray that starts before the S3 server must know it too; and no test may reach
        # a real bucket with the credentials of whoever runs it.
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{S3_PORT}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
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


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A server on loopback that speaks S3 over HTTP, with one bucket; yields the bucket's URL."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=S3_PORT, verbose=False)
    server.start()
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield "s3://bucket"
    server.stop()


@pytest.fixture
def s3_store(s3_server: str) -> str:
    """A prefix of its own on the S3 server: `s3://bucket/<unique>`."""
    return f"{s3_server}/{uuid.uuid4().hex}"
