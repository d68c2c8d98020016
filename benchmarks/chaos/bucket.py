"""A server on loopback that speaks S3, with one bucket, behind a proxy that can fail."""

from __future__ import annotations

import logging
import os
import random
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.chaos.outage import Outage, outage_before

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@dataclass(frozen=True)
class Bucket:
    """Where the runs find the store, and what can be done to it."""

    url: str
    outage: Outage

    @property
    def environment(self) -> dict[str, str]:
        """For the runs: they go through the proxy."""
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.outage.port}"}


@contextmanager
def s3_bucket(chance: random.Random) -> Iterator[Bucket]:
    """The server lives in this process, whose own requests meet no outage."""
    import fsspec
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it tells of every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    ours = {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        name = f"chaos-{uuid.uuid4().hex}"  # what was in others outlives their servers
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # they know another server
        fsspec.filesystem("s3").mkdir(name)
        with outage_before(port, chance) as outage:
            yield Bucket(f"s3://{name}", outage)
    finally:
        server.stop()
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        for name, text in before.items():
            if text is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = text
