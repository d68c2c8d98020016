"""Failures of the store itself, as words for people: no room, no rights, no answer, no store."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import RetryableError

if TYPE_CHECKING:
    from pipelines.store.location import Location

_LOCAL = {
    errno.ENOSPC: "no room is left there; make room (`ediffi cache gc` shows what nobody needs)",
    errno.EDQUOT: "the quota is used up; make room (`ediffi cache gc` shows what nobody needs)",
    errno.EROFS: "the file system is read-only; mount it for writing",
    errno.EIO: "the disk or its server failed; see the machine's log",
    errno.ESTALE: "the mount is stale; mount it again",
    errno.ENOTCONN: "the mount has lost its server; mount it again",
    errno.EHOSTDOWN: "the mount has lost its server; mount it again",
}
_SILENT_MODULES = ("botocore.", "aiobotocore.", "aiohttp.", "urllib3.")  # whose errors are outages


@contextmanager
def as_retryable(store: Location, doing: str) -> Iterator[None]:
    """Raise RetryableError, naming the place and what to do, where the store failed.

    Args:
        store: the store, or a folder in it.
        doing: what was tried, such as "publishing unit a".
    """
    try:
        yield
    except Exception as error:
        words = why_it_failed(error, store)
        if words is None:
            raise
        raise RetryableError(
            f"{doing}: {store}: {words}; then run the same command: what was published stays "
            f"({type(error).__name__}: {error})"
        ) from error


def why_it_failed(error: BaseException, store: Location) -> str | None:
    """What is wrong with the store, and what to do; None if the error is of another kind."""
    if isinstance(error, RetryableError):
        return None
    status = http_status(error)
    if status is not None:
        return _answered(status, error)
    if type(error).__module__.startswith(_SILENT_MODULES):
        return _silent(error)
    if not isinstance(error, OSError):
        return None
    if error.errno in _LOCAL:
        return _LOCAL[error.errno]
    if not isinstance(store, Path):
        if error.errno == errno.EBUSY:  # s3fs: an object was replaced between two requests
            return "a file there was replaced while it was read"
        is_cut = isinstance(error, ConnectionError | TimeoutError)
        return "the store does not answer; check the network and its endpoint" if is_cut else None
    if not _is_below(error.filename, store):
        return None
    if isinstance(error, PermissionError):
        return "this user may not read or write there any more; see the rights of the folder"
    if isinstance(error, FileNotFoundError) and not store.exists():
        return "it was there and is gone; mount it again, or see who removed it"
    return None


def _answered(status: int, error: BaseException) -> str | None:
    if status in (401, 403):
        return (
            "the store refuses our credentials: they may have run out or lost their rights; renew "
            "them (AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_SESSION_TOKEN or the role of the node)"
        )
    if status == 404 and "NoSuchBucket" in str(error.__cause__ or error):
        return "the bucket was there and is gone; see who removed it"
    if status in (408, 429) or status >= 500:
        return f"the store is out of order or overloaded (HTTP {status}); wait a while"
    return None


def _silent(error: BaseException) -> str:
    if "Credential" in type(error).__name__:
        return "there are no credentials for it; set AWS_PROFILE or AWS_ACCESS_KEY_ID"
    return "the store does not answer; check the network and AWS_ENDPOINT_URL"


def http_status(error: BaseException) -> int | None:
    """What the object store answered, if the error comes from an answer of one."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if not isinstance(response, dict):
        return None
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return int(status) if status else None


def _is_below(name: object, store: Path) -> bool:
    return isinstance(name, str | Path) and Path(name).is_relative_to(store)
