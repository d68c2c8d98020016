"""Whether the head of the Ray cluster still answers.

Without its head a driver's calls into Ray hang, and after `gcs_rpc_server_reconnect_timeout_s` Ray
ends the process on the spot. So the driver looks by itself before it calls, and ends in order.
"""

from __future__ import annotations

import socket
import time

import ray

from pipelines.errors import RetryableError

SILENT_S = 15.0  # a head that is restarted under the same address may be back by then
CONNECT_S = 2.0  # for one look


class HeadWatch:
    """Looks at the address where the cluster's tables are kept (its GCS).

    Args:
        address: host:port.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._silent_since: float | None = None

    @classmethod
    def of_this_cluster(cls) -> HeadWatch:
        return cls(ray.get_runtime_context().gcs_address)

    def answers(self) -> bool:
        """Look once.

        Raises:
            RetryableError: it has not answered for long.
        """
        try:
            self._connect()
        except OSError as error:
            now = time.monotonic()
            self._silent_since = self._silent_since or now
            if now - self._silent_since < SILENT_S:
                return False
            raise RetryableError(
                f"the head of the Ray cluster at {self._address} has not answered for "
                f"{SILENT_S:g} s ({error}); what was published stays: run the same command again "
                "once there is a cluster"
            ) from error
        self._silent_since = None
        return True

    @property
    def is_there(self) -> bool:
        """The same without a complaint."""
        try:
            self._connect()
        except OSError:
            return False
        return True

    def _connect(self) -> None:
        host, _, port = self._address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
