"""Tests of pipelines.errors: the exit codes that scripts rely on."""

from pipelines.errors import RetryableError, StageFailed, UserError


def test_exit_codes_tell_the_kinds_apart() -> None:
    """2 asks for a change, 3 for another try, 1 says that units failed."""
    assert (UserError.exit_code, RetryableError.exit_code, StageFailed.exit_code) == (2, 3, 1)


def test_no_kind_is_another() -> None:
    """Whoever catches one kind never catches another by the way."""
    kinds = (UserError, RetryableError, StageFailed)
    assert [[issubclass(one, other) for other in kinds].count(True) for one in kinds] == [1, 1, 1]
