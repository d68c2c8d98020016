"""Places in a store: local paths, or object stores behind the same interface.

`file://` and plain paths become `Path`; any other URL that fsspec knows, such as
`s3://bucket/prefix`, becomes a `UPath`. Endpoint and credentials come from the environment that
every tool of that store reads (`AWS_ENDPOINT_URL`, `AWS_PROFILE`, ...), never from a recipe.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import UserError
from pipelines.store.outages import http_status

if TYPE_CHECKING:
    from upath import UPath

    Location = Path | UPath
else:
    Location = Path  # upath costs 0.2 s to import, which a look at a local store can do without

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


def location(text: str | Path) -> Location:
    """The place that a path or URL names. Local ones become absolute.

    Raises:
        ValueError: the URL's scheme is unknown, or its library is not installed.
    """
    address = str(text)
    if "://" not in address or address.startswith("file://"):
        return Path(address.removeprefix("file://")).absolute()
    from upath import UPath

    # Others write to the store meanwhile: a remembered listing would be a lie.
    if address.startswith(("s3://", "s3a://")):
        return UPath(address, use_listings_cache=False)
    return UPath(address)


def is_remote(place: Location) -> bool:
    """Whether bytes there must be fetched before they can be mapped."""
    return not isinstance(place, Path)


def names_in(place: Location) -> list[str]:
    """Names of what lies in a folder, hidden ones left out; none if there is no such folder."""
    try:
        names = (
            os.listdir(place)
            if isinstance(place, Path)
            else [path.name for path in place.iterdir()]
        )
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [name for name in names if not name.startswith(".")]


def read_text(place: Location) -> str:
    """The whole of a small file in one request: others may replace it meanwhile.

    Raises:
        FileNotFoundError: it is not there.
    """
    return place.read_text() if isinstance(place, Path) else place.fs.cat_file(place.path).decode()


def write_atomically(place: Location, text: str) -> None:
    """Replace what lies there by `text`; readers see the old bytes or the new, never a mixture."""
    if not isinstance(place, Path):
        place.fs.pipe_file(place.path, text.encode())  # one request: object stores are atomic
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside_of(place)
    try:
        _write_through(aside, text)
        os.replace(aside, place)
    finally:
        aside.unlink(missing_ok=True)


def _write_through(path: Path, text: str) -> None:
    """Write a new file as far as the disk."""
    with path.open("x") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _aside_of(place: Path) -> Path:
    """A hidden name beside a file, under which it is written before it gets its own."""
    return place.with_name(f".{place.name}.{uuid.uuid4().hex}")


def is_aside(name: str) -> bool:
    """Whether a file name is that of a file on its way to its name."""
    return re.fullmatch(r"\..+\.[0-9a-f]{32}", name) is not None


def clear_asides(folder: Location) -> None:
    """Remove what writers of this folder were writing when they were killed.

    For a folder in which nobody writes any more.
    """
    if isinstance(folder, Path) and folder.exists():
        for path in folder.iterdir():
            if is_aside(path.name) and not path.is_dir():
                path.unlink(missing_ok=True)


def create_exclusively(place: Location, text: str) -> bool:
    """Make a file that must not be there yet: of any number of writers one succeeds.

    Args:
        text: the writer's own, equal to no other writer's: if the answer to a request got lost and
            the request was sent again, the text is how we know the file for ours.

    Returns:
        Whether the file is ours.

    Raises:
        UserError: this kind of store has no such operation.
    """
    if isinstance(place, Path):
        is_made = _link_exclusively(place, text)
    elif place.protocol in ("s3", "s3a"):
        is_made = _put_exclusively(place, text)
    else:
        raise UserError(
            f"store: {place} lies on {place.protocol}://, where a file cannot be created "
            "exclusively; drivers need that to keep off each other's stages: use a directory that "
            "every node mounts, or s3://"
        )
    return is_made or _reads(place, text)


def _link_exclusively(place: Path, text: str) -> bool:
    """Give a finished file its name, so that no reader sees half of it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside_of(place)
    try:
        _write_through(aside, text)
        try:
            os.link(aside, place)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _open_exclusively(place, text)
        return True
    finally:
        aside.unlink(missing_ok=True)


def _open_exclusively(place: Path, text: str) -> bool:
    """The same where there are no links; for a moment readers may see an empty file.

    So does whoever comes after a crash in that moment: empty files stand for none.
    """
    try:
        stream = place.open("x")
    except FileExistsError:
        return False
    try:
        with stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        place.unlink(missing_ok=True)
        raise
    return True


def _put_exclusively(place: UPath, text: str) -> bool:
    """One conditional put (If-None-Match: *)."""
    for wait_s in (0.1, 0.2, 0.4, 0.8, None):
        try:
            place.fs.pipe_file(place.path, text.encode(), mode="create")
            return True
        except FileExistsError:
            return False
        except OSError as error:
            status = http_status(error)
            if status == 412:
                return False
            if status != 409 or wait_s is None:  # 409: another put of it is under way
                raise
        time.sleep(wait_s)
    raise AssertionError("the last round returns or raises")


def _reads(place: Location, text: str) -> bool:
    try:
        return read_text(place) == text
    except FileNotFoundError:
        return False


def check_exclusive_create(store: Location) -> None:
    """Make sure that a store creates files exclusively: drivers keep off each other by it.

    Raises:
        UserError: it does not, or cannot say.
    """
    place = store / ".scratch" / f"exclusive-create-{uuid.uuid4().hex}"
    try:
        first, second = create_exclusively(place, "first"), create_exclusively(place, "second")
        found = read_text(place)
    finally:
        place.unlink(missing_ok=True)
    if (first, second, found) != (True, False, "first"):
        raise UserError(
            f"store: {store}: this store ignores conditional writes: of two creates of one file "
            "the second must be refused; two drivers would work on one stage. Use a store that "
            "honours If-None-Match (AWS S3, MinIO, Ceph, R2), or a directory that every node mounts"
        )


def store_time(store: Location) -> float:
    """Epoch seconds by the clock that the times of the store's files are read off."""
    place = store / ".scratch" / f"time-{uuid.uuid4().hex}"
    write_atomically(place, "")
    try:
        return float(place.stat().st_mtime)
    finally:
        place.unlink(missing_ok=True)


def publish(source: Path, target: Location) -> None:
    """Move a finished local file to its place, whole or not at all.

    A local `source` must lie on the file system of `target`.
    """
    if not isinstance(target, Path):
        target.fs.put_file(str(source), target.path)  # appears when its last part has arrived
        return
    with source.open("rb") as stream:
        os.fsync(stream.fileno())
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


@contextmanager
def local_copy(place: Location) -> Iterator[Path]:
    """A file on this machine, by its own name: itself, or a copy for as long as the context."""
    if isinstance(place, Path):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="ediffi-copy-") as folder:
        path = Path(folder) / place.name
        place.fs.get_file(place.path, str(path))
        yield path


def duplicate(source: Location, target: Location) -> None:
    """Give a file a second place in the same store: a hard link, or a copy inside the store."""
    if not isinstance(target, Path):
        assert not isinstance(source, Path), "both places lie in one store"
        target.fs.copy(source.path, target.path)
        return
    assert isinstance(source, Path), "both places lie in one store"
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside_of(target)
    try:
        os.link(source, aside)
    except OSError:  # some file systems have no links
        shutil.copyfile(source, aside)
    os.replace(aside, target)


def remove_tree(place: Location) -> None:
    """Remove a folder and all in it, if it is there."""
    if isinstance(place, Path):
        shutil.rmtree(place, ignore_errors=True)
    elif place.exists():
        place.fs.rm(place.path, recursive=True)
