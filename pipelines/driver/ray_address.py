"""Whether anybody listens at the address of a Ray cluster: Ray itself takes minutes to say no."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit


def silence_at(address: str, timeout_s: float = 5.0) -> OSError | None:
    """Why nobody can be reached there; None if somebody listens, or for Ray's own words ("auto").

    Raises:
        ValueError: the port is no number.
    """
    parts = urlsplit(f"//{address.rpartition('//')[2]}")
    if parts.port is None:
        return None
    try:
        socket.create_connection((parts.hostname or "", parts.port), timeout=timeout_s).close()
    except OSError as error:
        return error
    return None
