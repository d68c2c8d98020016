"""How soon Ray gives up a node: settings from one number."""

import pytest

from cluster.failure_detection import failure_detection


@pytest.mark.parametrize("node_loss_s", [4, 20, 60])
def test_settings_follow_from_the_time(node_loss_s: int) -> None:
    """Neither missed health checks nor calls under way take longer than the time that was asked."""
    settings = {name: int(value) for name, value in failure_detection(node_loss_s).items()}
    period_ms = settings["RAY_health_check_period_ms"]
    missed_ms = period_ms * settings["RAY_health_check_failure_threshold"]
    assert 0 < missed_ms + settings["RAY_health_check_timeout_ms"] <= 1000 * node_loss_s
    call_ms = sum(settings[f"RAY_grpc_client_keepalive_{word}_ms"] for word in ("time", "timeout"))
    assert call_ms == 1000 * node_loss_s
    assert settings["RAY_gcs_rpc_server_reconnect_timeout_s"] > node_loss_s


@pytest.mark.parametrize("node_loss_s", [0, 3, 4.5, True])
def test_too_soon_is_refused(node_loss_s: object) -> None:
    """A busy machine would be taken for a dead one."""
    with pytest.raises(ValueError, match="node_loss_s must be a whole number of seconds"):
        failure_detection(node_loss_s)  # type: ignore[arg-type]
