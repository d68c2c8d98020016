"""Files that a recipe names by a pattern or a place, and what tells one version from another."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.store.location import Location


@dataclass(frozen=True, kw_only=True)
class TarSource:
    """A tar made elsewhere."""

    place: str  # absolute path or URL
    num_bytes: int
    version: str  # changes when the file is written anew


def find_tars(pattern: str) -> list[TarSource]:
    """All files that match a glob of paths or of a URL and end in `.tar`, by name."""
    if not _is_url(pattern):
        found = (Path(name).absolute() for name in glob.glob(pattern.removeprefix("file://")))
        return sorted(
            (_local(path) for path in found if path.suffix == ".tar"), key=lambda tar: tar.place
        )
    import fsspec

    files, path = fsspec.core.url_to_fs(pattern)
    files.invalidate_cache()  # others may have written since
    infos = files.glob(path, detail=True)
    return [
        TarSource(
            place=files.unstrip_protocol(name),
            num_bytes=int(info["size"]),
            version=_version(info),
        )
        for name, info in sorted(infos.items())
        if name.endswith(".tar")
    ]


def absolute(pattern: str) -> str:
    """A path or pattern that no longer depends on the working directory; URLs stay."""
    if _is_url(pattern):
        return pattern
    return str(Path(pattern.removeprefix("file://")).absolute())


def version_of(place: Location) -> str:
    """What changes when a file is written anew: of its time and size, or an object's tag."""
    if isinstance(place, Path):
        return _local(place).version
    return _version(place.fs.info(place.path))


def _local(path: Path) -> TarSource:
    status = path.stat()
    version = f"{status.st_size} {status.st_mtime_ns}"
    return TarSource(place=str(path), num_bytes=status.st_size, version=version)


def _version(info: Mapping[str, Any]) -> str:
    for name in ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created"):
        if info.get(name):
            return f"{info['size']} {info[name]}".replace('"', "")
    return str(info["size"])


def _is_url(pattern: str) -> bool:
    return "://" in pattern and not pattern.startswith("file://")
