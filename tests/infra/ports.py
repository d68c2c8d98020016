"""Ports for servers that need seconds until they listen."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from itertools import islice

# Linux gives the ports from 32768 on to outgoing connections, so one of those that is free now may
# be taken when the server wants it; Ray keeps those up to 19999 for its workers.
RANGE = range(20_000, 32_000)


def free_ports(number: int) -> list[int]:
    """Different ports that nobody uses, and that no outgoing connection is given."""
    return list(islice(filter(_is_free, random.sample(RANGE, len(RANGE))), number))


def free_port() -> int:
    """One such port."""
    return free_ports(1)[0]


def _is_free(port: int) -> bool:
    with suppress(OSError), socket.socket() as probe:
        probe.bind(("", port))
        return True
    return False
