"""How long to wait before a unit is tried again."""

from __future__ import annotations

import hashlib

CAP_S = 60.0
JITTER_FRACTION = 0.25  # units that failed together come back one after another


def delay_s(first_s: float, num_failures: int, unit_id: str) -> float:
    """Seconds before the next attempt, the same for the same unit every time.

    Args:
        first_s: after the first failure; doubles with each further one, up to `CAP_S`.
    """
    whole = first_s * 2.0 ** min(num_failures - 1, 32)
    digest = hashlib.sha256(f"{unit_id}/{num_failures}".encode()).digest()
    share = int.from_bytes(digest[:4], "big") / 2**32
    return min(whole, CAP_S) * (1 + JITTER_FRACTION * share)
