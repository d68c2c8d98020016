"""Places in a store: local paths, or object stores behind the same interface.

`file://` and plain paths become `Path`; any other URL that fsspec knows, such as
`s3://bucket/prefix`, becomes a `UPath`. Endpoint and credentials come from the environment that
every tool of that store reads (`AWS_ENDPOINT_URL`, `AWS_PROFILE`, ...), never from a recipe.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upath import UPath

    Location = Path | UPath
else:
    Location = Path  # upath costs 0.2 s to import, which a look at a local store can do without


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


def write_atomically(place: Location, text: str) -> None:
    """Replace what lies there by `text`; readers see the old bytes or the new, never a mixture."""
    if not isinstance(place, Path):
        place.fs.pipe_file(place.path, text.encode())  # one request: object stores are atomic
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    try:
        with aside.open("w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, place)
    finally:
        aside.unlink(missing_ok=True)


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
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
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
