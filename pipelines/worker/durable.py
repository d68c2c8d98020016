"""A unit's durable folder: checkpoints and progress that outlive attempts and drivers.

In a local store it is a folder of the stage. Beside an object store it is a local folder, filled
from the store when an attempt begins and copied back in the background; a checkpoint reaches the
store before the mark that completes it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipelines.store.location import Location, names_in, read_text

PROGRESS_FILE = "progress.jsonl"
GRIDS_FOLDER = "grids"
LEVELS_FOLDER = "levels"  # of an expert that grew through others: a folder for each of them
CHECKPOINTS_FOLDER = "checkpoints"  # each folder in it is complete once it is marked
PUSH_S = 5.0  # between copies to an object store
_MARK = "complete.json"  # see `ediffi.train.checkpoint`


class Durable:
    """The durable folder of one attempt; `path` is local.

    Use as a context manager: leaving it copies what is new to the store.

    Args:
        may_copy: called before every copy to an object store; raises what forbids it.
        new_folder: makes the local folder beside an object store: where it is cleared away if this
            process is killed.
    """

    def __init__(
        self,
        place: Location,
        may_copy: Callable[[], None] = lambda: None,
        new_folder: Callable[[], Path] = lambda: Path(tempfile.mkdtemp(prefix="ediffi-durable-")),
    ) -> None:
        self._lock = threading.Lock()  # a checkpoint is written, and warned of, in the background
        self._copier: _Copier | None = None
        if isinstance(place, Path):
            self.path = place
            self.path.mkdir(parents=True, exist_ok=True)
            return
        self.path = new_folder()
        for name in _remote_files(place):
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            place.fs.get_file(f"{place.path}/{name}", str(target))
        self._copier = _Copier(self.path, place, may_copy)

    def __enter__(self) -> Durable:
        return self

    def __exit__(self, *_: object) -> None:
        if self._copier is not None:
            try:
                self._copier.close()
            finally:
                shutil.rmtree(self.path, ignore_errors=True)

    def report(self, row: Mapping[str, float]) -> None:
        """Keep a row of progress.

        Raises:
            OSError: an earlier copy to the store failed.
        """
        self._append(row)
        if self._copier is not None:
            self._copier.wake()

    def notice(self, text: str) -> None:
        """Keep words for people; they reach a bucket with the next row."""
        self._append({"notice": text})

    def _append(self, row: Mapping[str, float] | Mapping[str, str]) -> None:
        with self._lock, (self.path / PROGRESS_FILE).open("a") as stream:
            # The newline goes first: a row that a killed attempt tore stands alone.
            stream.write("\n" + json.dumps(row))


class _Copier:
    """Makes a folder in a bucket equal to a local one, in the background: training does not wait.

    Args:
        source: where one thread reports and another writes checkpoints meanwhile.
    """

    def __init__(
        self, source: Path, place: Location, may_copy: Callable[[], None] = lambda: None
    ) -> None:
        self._source, self._place, self._may_copy = source, place, may_copy
        self._wish = threading.Event()
        self._ends = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="durable", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Copy soon; raises what the last copy failed with."""
        if (error := self._error) is not None:
            raise error
        self._wish.set()

    def close(self) -> None:
        """Copy what is left, and end."""
        self._ends.set()
        self._wish.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        self.copy()

    def _work(self) -> None:
        while self._wish.wait() and not self._ends.is_set():
            self._wish.clear()
            try:
                self.copy()
            except BaseException as error:
                self._error = error
                return
            self._ends.wait(PUSH_S)

    def copy(self) -> None:
        """Copy what is new, a checkpoint's mark after its files; remove what is gone."""
        assert not isinstance(self._place, Path)
        self._may_copy()
        fs, root = self._place.fs, self._place.path
        there, here = _remote_files(self._place), _finished_files(self._source)
        if not self._source.exists():  # else all that is there would go
            raise FileNotFoundError(
                f"{self._source}: another driver took this run for ended and cleared its work in "
                f"flight; what was copied to {self._place} before stays"
            )
        vanished: set[str] = set()  # checkpoints retired meanwhile
        for name in sorted(here, key=lambda name: (name.endswith(_MARK), name)):
            folder = name.rpartition("/")[0]
            if there.get(name) == here[name] or folder in vanished:
                continue
            try:
                fs.put_file(str(self._source / name), f"{root}/{name}")
            except FileNotFoundError:
                if (self._source / name).exists():
                    raise
                vanished.add(folder)
        # A checkpoint loses its mark before its files.
        for name in sorted(there.keys() - here, key=lambda name: not name.endswith(_MARK)):
            fs.rm_file(f"{root}/{name}")


def _finished_files(folder: Path) -> dict[str, int]:
    """Name -> size in bytes of all but what is being written: hidden, or a checkpoint unmarked."""
    found = {}
    for place, folders, names in os.walk(folder):
        is_among = Path(place).name == CHECKPOINTS_FOLDER
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and (not is_among or Path(place, name, _MARK).exists())
        ]
        for path in (Path(place, name) for name in names if not name.startswith(".")):
            with suppress(FileNotFoundError):  # it was removed meanwhile
                found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return found


def _remote_files(place: Location) -> dict[str, int]:
    """Name below `place` -> size in bytes."""
    assert not isinstance(place, Path)
    found = place.fs.find(place.path, detail=True)
    prefix = place.path.rstrip("/") + "/"
    return {path.removeprefix(prefix): entry["size"] for path, entry in found.items()}


@dataclass(frozen=True)
class Reports:
    """What a unit has reported.

    Attributes:
        rows: metrics, without those that a resumed attempt has overtaken.
        notices: words for people, each once, however often a resumed attempt said it again.
    """

    rows: list[dict[str, float]]
    notices: list[str]


def read_reports(place: Location) -> Reports:
    """Everything a unit has reported so far; nothing if it never did.

    A row that was being written when its worker died is left out.

    Args:
        place: the unit's durable folder.
    """
    rows: list[dict[str, float]] = []
    notices: dict[str, None] = {}
    try:
        text = read_text(place / PROGRESS_FILE)
    except FileNotFoundError:
        return Reports(rows, [])
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "notice" in row:
            notices[row["notice"]] = None
            continue
        while rows and "images" in row and rows[-1].get("images", -1) >= row["images"]:
            rows.pop()
        rows.append(row)
    return Reports(rows, list(notices))


def read_progress(place: Location) -> list[dict[str, float]]:
    """The rows of `read_reports`."""
    return read_reports(place).rows


def grids_in(place: Location) -> dict[str, Location]:
    """The pictures that training has drawn so far, oldest first, by name.

    Those of a level, a run that an expert grew through, are named `<level>/images-…png`.
    """
    folders = {"": place / GRIDS_FOLDER}
    for level in sorted(names_in(place / LEVELS_FOLDER)):
        folders[f"{level}/"] = place / LEVELS_FOLDER / level / GRIDS_FOLDER
    return {
        prefix + name: folder / name
        for prefix, folder in folders.items()
        for name in sorted(names_in(folder))
        if name.endswith(".png")
    }
