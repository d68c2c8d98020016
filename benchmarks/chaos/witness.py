"""Somebody who watches a store while it is attacked, and remembers every receipt."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pipelines.store.location import Location

LOOK_S = 0.05
LOOK_IN_BUCKET_S = 0.5
FINISHED = "manifest.json"


class Witness:
    """Looks at the store again and again; use as a context manager.

    Attributes:
        done_again: receipts that were replaced although they had been there: work that had been
            proven done was done again.
    """

    def __init__(self, store: Location) -> None:
        self._store = store
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="witness", daemon=True)
        self._receipts: dict[str, Any] = {}
        self._stages: dict[str, bool] = {}  # folder -> whether it has its manifest
        self.done_again: list[str] = []
        self.error: BaseException | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self.look()

    @property
    def num_commits(self) -> int:
        """Receipts and manifests so far."""
        return len(self._receipts) + sum(list(self._stages.values()))

    @property
    def num_receipts(self) -> int:
        """Units that are done so far."""
        return len(self._receipts)

    @property
    def under_way(self) -> list[str]:
        """Names of stages that have been begun and not finished."""
        stages = list(self._stages.items())  # the other thread goes on adding
        return sorted(folder.rpartition("/")[0] for folder, is_done in stages if not is_done)

    def look(self) -> None:
        """Take in what lies there now."""
        for name, stamp in self._listing():
            folder, _, file = name.rpartition("/")
            if file == FINISHED:
                self._stages[folder] = True
            elif file == "identity.json":
                self._stages.setdefault(folder, False)
            elif folder.endswith("/receipts"):
                if self._receipts.get(name, stamp) != stamp:
                    self.done_again.append(name)
                self._receipts[name] = stamp

    def _watch(self) -> None:
        pause_s = LOOK_S if isinstance(self._store, Path) else LOOK_IN_BUCKET_S
        try:
            while not self._is_over.wait(pause_s):
                self.look()
        except BaseException as error:
            self.error = error
            raise

    def _listing(self) -> Iterator[tuple[str, Any]]:
        """Name below the store and what changes when a file is replaced, of all records."""
        if isinstance(self._store, Path):
            yield from _local(str(self._store), "")
            return
        root = self._store.path.rstrip("/") + "/"
        self._store.fs.invalidate_cache()
        for path, entry in self._store.fs.find(self._store.path, detail=True).items():
            name = path.removeprefix(root)
            if name.endswith(".json"):
                yield name, (entry["ETag"], str(entry["LastModified"]))


def _local(folder: str, prefix: str) -> Iterator[tuple[str, Any]]:
    """As `Witness._listing`; folders that hold no records are not entered."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        name = f"{prefix}{entry.name}"
        if entry.name.startswith("."):
            continue
        try:
            if entry.is_dir():
                if prefix.count("/") < 4 and entry.name not in _WITHOUT_RECORDS:
                    yield from _local(entry.path, f"{name}/")
            elif entry.name.endswith(".json"):
                stat = entry.stat()
                yield name, (stat.st_ino, stat.st_mtime_ns)
        except FileNotFoundError:
            continue


_WITHOUT_RECORDS = frozenset({"durable", "logs", "mlflow-artifacts", "rejects", "runs"})


def wait_a_while(seconds: float, has_ended: Any) -> bool:
    """Wait; False as soon as what was to be waited for has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if has_ended():
            return False
        time.sleep(min(0.02, max(0.0, until - time.monotonic())))
    return not has_ended()
