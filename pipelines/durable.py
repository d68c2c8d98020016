"""A unit's durable folder: checkpoints and progress that outlive attempts and drivers.

In a local store it is a folder of the stage. Beside an object store it is a local folder, filled
from the store when an attempt begins and copied back when the unit reports; a checkpoint reaches
the store before the mark that completes it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from pipelines.location import Location

PROGRESS_FILE = "progress.jsonl"
PUSH_S = 5.0  # between copies of progress to an object store
_MARK = "complete.json"  # see `ediffi.train.checkpoint`


class Durable:
    """The durable folder of one attempt; `path` is local.

    Use as a context manager: leaving it copies what is new to the store.
    """

    def __init__(self, place: Location) -> None:
        self._place = place
        self._next_push = 0.0
        if isinstance(place, Path):
            self.path = place
            self.path.mkdir(parents=True, exist_ok=True)
            return
        self.path = Path(tempfile.mkdtemp(prefix="ediffi-durable-"))
        for name in _remote_files(place):
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            place.fs.get_file(f"{place.path}/{name}", str(target))

    def __enter__(self) -> Durable:
        return self

    def __exit__(self, *_: object) -> None:
        if not isinstance(self._place, Path):
            self._push()
            shutil.rmtree(self.path, ignore_errors=True)

    def report(self, row: Mapping[str, float]) -> None:
        """Keep a row of progress; the unit is between two steps and writes nothing itself."""
        with (self.path / PROGRESS_FILE).open("a") as stream:
            # The newline goes first: a row that a killed attempt tore stands alone.
            stream.write("\n" + json.dumps(row))
        if not isinstance(self._place, Path) and time.monotonic() >= self._next_push:
            self._push()

    def _push(self) -> None:
        """Make the folder in the store equal to the local one."""
        assert not isinstance(self._place, Path)
        fs, root = self._place.fs, self._place.path
        there = _remote_files(self._place)
        here = {
            path.relative_to(self.path).as_posix(): path.stat().st_size
            for path in self.path.rglob("*")
            if path.is_file()
        }
        for name in sorted(here, key=lambda name: (name.endswith(_MARK), name)):
            if there.get(name) != here[name]:
                fs.put_file(str(self.path / name), f"{root}/{name}")
        # A checkpoint loses its mark before its files.
        for name in sorted(there.keys() - here, key=lambda name: not name.endswith(_MARK)):
            fs.rm_file(f"{root}/{name}")
        self._next_push = time.monotonic() + PUSH_S


def _remote_files(place: Location) -> dict[str, int]:
    """Name below `place` -> size in bytes."""
    assert not isinstance(place, Path)
    found = place.fs.find(place.path, detail=True)
    prefix = place.path.rstrip("/") + "/"
    return {path.removeprefix(prefix): entry["size"] for path, entry in found.items()}


def read_progress(place: Location) -> list[dict[str, float]]:
    """The rows a unit reported, without those that a resumed attempt has overtaken.

    A row that was being written when its worker died is left out.

    Args:
        place: the unit's durable folder.
    """
    rows: list[dict[str, float]] = []
    try:
        text = (place / PROGRESS_FILE).read_text()
    except FileNotFoundError:
        return rows
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        while rows and "images" in row and rows[-1].get("images", -1) >= row["images"]:
            rows.pop()
        rows.append(row)
    return rows
