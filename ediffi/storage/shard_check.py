"""Files of shards held against what was recorded of them, before training starts on them."""

from __future__ import annotations

import hashlib
import os
import random
import stat
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Literal, get_args

from ediffi.storage import remote
from ediffi.storage.shard_files import ShardFile
from ediffi.storage.tar_index import MappedTar, ShardError

Verify = Literal["sizes", "sample", "all"]

_NUM_SAMPLED_FILES = 4
_MAX_SAMPLED_BYTES = 256 << 20  # about a quarter of a second of hashing


def check_files(files: Iterable[ShardFile], *, verify: Verify, seed: int) -> None:
    """Compare files with their records.

    Args:
        files: sizes and digests that are unknown are not compared.
        verify: `sizes` sees that every file is there and as long as recorded: one look at each
            local file, one listing for each remote folder. `sample` also hashes a few local ones
            (remote ones are hashed when they are fetched). `all` reads everything.
        seed: of the choice of those few.

    Raises:
        ShardError: files differ; the message tells the first, and how many there are.
        ValueError: unknown `verify`.
        OSError: a folder or file cannot be read.
    """
    if verify not in get_args(Verify):
        choices = ", ".join(get_args(Verify))
        raise ValueError(f"verify must be one of {choices}, got {verify!r}")
    files = list(files)
    _raise_first(list(_wrong_sizes(files)), len(files))
    hashed = [file for file in files if file.sha256]
    if verify == "sample":
        hashed = _choose(hashed, seed)
    if verify != "sizes":
        _raise_first(list(_wrong_digests(hashed)), len(hashed))


def _wrong_sizes(files: list[ShardFile]) -> Iterator[str]:
    addresses = [str(file.location) for file in files]
    urls = {address for address in addresses if remote.is_remote(address)}
    remote_sizes = remote.sizes_in_folders(sorted(urls))
    for file, address in zip(files, addresses):
        found = remote_sizes.get(address) if address in urls else _local_size(address)
        if found is None:
            required = f"{file.num_bytes} bytes recorded" if file.num_bytes else "a tar required"
            yield f"{address}: {required}, no such file found; produce it again"
        elif file.num_bytes and found != file.num_bytes:
            yield (
                f"{address}: {found} bytes found, {file.num_bytes} recorded: the file is not "
                "the one that was recorded; produce it again"
            )


def _local_size(address: str) -> int | None:
    """Size of a file, None if there is none. Without Path: a run has a million of them."""
    try:
        about = os.stat(address.removeprefix("file://"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return about.st_size if stat.S_ISREG(about.st_mode) else None


def _choose(files: list[ShardFile], seed: int) -> list[ShardFile]:
    """A few local files, at least one, as many as can be hashed without a wait."""
    local = [file for file in files if not remote.is_remote(file.location)]
    few = random.Random(seed).sample(local, min(len(local), _NUM_SAMPLED_FILES))
    chosen: list[ShardFile] = []
    for file in few:
        if chosen and sum(f.num_bytes for f in [*chosen, file]) > _MAX_SAMPLED_BYTES:
            break
        chosen.append(file)
    return chosen


def _wrong_digests(files: list[ShardFile]) -> Iterator[str]:
    for file in files:
        found = _sha256(file)
        if found != file.sha256:
            yield (
                f"{file.location}: sha256 {found} found, {file.sha256} recorded: the file is not "
                "the one that was recorded; produce it again"
            )


def _sha256(file: ShardFile) -> str:
    if not remote.is_remote(file.location):
        with closing(MappedTar(remote.local_path(file.location))) as tar:
            return tar.sha256()
    url = str(file.location)
    digest = hashlib.sha256()
    for chunk in remote.chunks(url, file.num_bytes or remote.size_and_version(url)[0]):
        digest.update(chunk)
    return digest.hexdigest()


def _raise_first(problems: list[str], num_files: int) -> None:
    if problems:
        others = f" ({len(problems)} of {num_files} files differ)" if len(problems) > 1 else ""
        raise ShardError(f"{problems[0]}{others}")
