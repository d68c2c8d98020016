"""Tests of pipelines.driver.failures: the unit's own words, out of Ray's wrapping."""

from ray.exceptions import RayTaskError
from ray.train import WorkerGroupError

from ediffi.train.guard import TrainingDiverged
from ediffi.train.stop import Stopped
from pipelines.driver.failures import is_hopeless, is_passing, root_message, stopped
from pipelines.errors import RetryableError, UserError


def wrapped(inner: Exception) -> Exception:
    """What the driver gets of a training worker's exception."""
    gang = WorkerGroupError("a long story", {0: inner, 1: RuntimeError("connection closed")})
    error: Exception = RayTaskError("run_gang", "a traceback", gang).as_instanceof_cause()
    return error


def test_the_message_of_a_gang_is_that_of_its_worker() -> None:
    """Ray wraps what a training worker raised several times over; the user reads the core."""
    inner = ValueError("batch_images must be a multiple of the 3 ranks")
    assert root_message(wrapped(inner)) == f"ValueError: {inner}"
    assert root_message(RuntimeError()) == "RuntimeError"


def test_the_kind_of_a_failure_is_that_of_its_core() -> None:
    """It decides whether to try again, and what the run's exit code says."""
    assert is_hopeless(wrapped(ValueError("no")))
    assert is_hopeless(wrapped(TrainingDiverged("the gradient norm is nan")))
    assert is_hopeless(wrapped(UserError("no")))
    assert is_passing(wrapped(RetryableError("later")))
    assert not is_passing(wrapped(KeyError("x")))
    word = stopped(wrapped(Stopped(96)))
    assert word is not None
    assert word.images_seen == 96
    assert stopped(wrapped(KeyError("x"))) is None
