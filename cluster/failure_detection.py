"""How soon Ray gives up a node that does not answer.

As Ray comes, a node whose processes were killed is missed after some seconds, but one that was cut
off from the network only after about a minute, and whoever waits for it may wait for ever. These
are settings of the cluster: the same must stand in the environment of `ray start` on every node,
and of the driver. A node given up for dead may live on, out of reach; its late results are refused
by the store, not by Ray.
"""

from __future__ import annotations

MINIMUM_S = 4  # below it a busy machine is taken for a dead one
NUM_MISSED = 4  # answers in a row that a node may leave out


def failure_detection(node_loss_s: int) -> dict[str, str]:
    """Return Ray's settings by which a lost node is given up after about `node_loss_s`.

    Raises:
        ValueError: less than Ray can tell from a busy machine.
    """
    if isinstance(node_loss_s, bool) or not isinstance(node_loss_s, int) or node_loss_s < MINIMUM_S:
        raise ValueError(
            f"node_loss_s must be a whole number of seconds, at least {MINIMUM_S}, got "
            f"{node_loss_s!r}"
        )
    every_ms = 1000 * node_loss_s // (2 * NUM_MISSED)
    return {
        "RAY_health_check_initial_delay_ms": str(2 * every_ms),
        "RAY_health_check_period_ms": str(every_ms),
        "RAY_health_check_timeout_ms": str(2 * every_ms),
        "RAY_health_check_failure_threshold": str(NUM_MISSED),
        # calls under way, such as a driver's to a worker that was cut off
        "RAY_grpc_client_keepalive_time_ms": str(500 * node_loss_s),
        "RAY_grpc_client_keepalive_timeout_ms": str(500 * node_loss_s),
        # a node that cannot reach the head for so long ends itself
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(max(30, 2 * node_loss_s)),
    }
