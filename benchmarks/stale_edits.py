"""The edits of the stale-cache toy: what each changes, and what is right after it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

Verdict = str  # "right", "wrong hit" or "needless miss"
CAPTION, OTHER_CAPTION = "a red ring", "a red disk"
STEPS = frozenset({"read", "helped", "scaled"})


@dataclass(frozen=True, kw_only=True)
class Wording:
    """How a side writes the second step's setting and what it takes, each before and after."""

    setting: tuple[str, str] = ('"add": 10', '"add": 20')
    resources: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One edit, and what follows from it.

    Args:
        make: changes the toy's folder.
        changes: steps whose results it changes.
        caption: that the shard then has; `helper`, `add` and `factor` likewise.
    """

    name: str
    make: Callable[[Path, Wording], None]
    changes: frozenset[str] = frozenset()
    caption: str = CAPTION
    helper: int = 1
    add: int = 10
    factor: int = 3

    @property
    def right(self) -> int:
        """The number that must come out."""
        return (sum(self.caption.encode()) + self.helper + self.add) * self.factor


def judge(edit: Edit, number: int, steps: Sequence[str]) -> Verdict:
    """What to call the number that came out, and the steps that were done for it."""
    if number != edit.right:
        return "wrong hit"
    return "needless miss" if set(steps) - edit.changes else "right"


def write_shard(path: Path, caption: str, key: str = "one") -> None:
    """A webdataset tar of one picture; captions of equal length give files of equal size."""
    from PIL import Image

    from ediffi.storage.shard_format import ShardWriter

    picture = BytesIO()
    Image.new("RGB", (16, 16), "red").save(picture, "PNG")
    with ShardWriter(path) as writer:
        writer.write(key, {"png": picture.getvalue(), "txt": caption.encode()})


def replace_once(folder: Path, old: str, new: str) -> None:
    """Edit the one file of the toy that says `old`. Raises ValueError if there is not just one."""
    texts = {
        path: path.read_text()
        for pattern in ("*.py", "*.yaml", "*.json")
        for path in folder.glob(pattern)
    }
    places = [path for path, text in texts.items() for _ in range(text.count(old))]
    if len(places) != 1:
        raise ValueError(f"{old!r} must stand once in {folder}, found in {places}")
    places[0].write_text(texts[places[0]].replace(old, new))


def _text(old: str, new: str) -> Callable[[Path, Wording], None]:
    return lambda folder, wording: replace_once(folder, old, new)


def _new_bytes(folder: Path, wording: Wording) -> None:
    """Another caption of the same length."""
    path = folder / "input.tar"
    num_bytes = path.stat().st_size
    write_shard(path, OTHER_CAPTION)
    assert path.stat().st_size == num_bytes, "the edit is to keep the size"


def _new_bytes_old_time(folder: Path, wording: Wording) -> None:
    before = (folder / "input.tar").stat()
    _new_bytes(folder, wording)
    os.utime(folder / "input.tar", ns=(before.st_atime_ns, before.st_mtime_ns))


EDITS = (
    Edit(name="nothing", make=lambda folder, wording: None),
    Edit(
        name="a helper function, in a module of its own",
        make=_text("number + 1", "number + 2"),
        changes=frozenset({"helped", "scaled"}),
        helper=2,
    ),
    Edit(
        name="a setting",
        make=lambda folder, wording: replace_once(folder, *wording.setting),
        changes=frozenset({"helped", "scaled"}),
        add=20,
    ),
    Edit(
        name="bytes of the input, its size as before",
        make=_new_bytes,
        changes=STEPS,
        caption=OTHER_CAPTION,
    ),
    Edit(
        name="what a step takes (CPUs)",
        make=lambda folder, wording: replace_once(folder, *wording.resources),
    ),
    Edit(name="a comment in a step", make=_text("# a remark", "# another remark")),
    Edit(
        name="what a closure has captured",
        make=_text("times(3)", "times(4)"),
        changes=frozenset({"scaled"}),
        factor=4,
    ),
    # beyond what was asked: where ours, too, may be expected to be wrong
    Edit(
        name="bytes of the input, its size and time as before",
        make=_new_bytes_old_time,
        changes=STEPS,
        caption=OTHER_CAPTION,
    ),
    Edit(
        name="the time of the input alone",
        make=lambda folder, wording: (folder / "input.tar").touch(),
    ),
    Edit(
        name="a function beside the helper that no step calls",
        make=_text("number - 1", "number - 2"),
    ),
)
