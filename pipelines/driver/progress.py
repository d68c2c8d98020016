"""Narration on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from pipelines.masking import masker

LINE_EVERY_S = 10.0


class Progress:
    """Tells a person how far each stage is."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._is_terminal = self._console.is_terminal
        self._bars = RichProgress(
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
        )
        self._mask = masker()
        self._ids: dict[str, TaskID] = {}
        self._num_units: dict[str, int] = {}
        self._next_line: dict[str, float] = {}

    def __enter__(self) -> Progress:
        if self._is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_terminal:
            self._bars.stop()

    def say(self, text: str) -> None:
        """Print a line above the bars, without secrets."""
        self._console.print(self._mask(text), markup=False)

    def cached(self, stage: str) -> None:
        self.say(f"{stage}: cached")

    def started(self, stage: str, num_units: int, num_reused: int) -> None:
        self._num_units[stage] = num_units
        if num_reused:
            self.say(f"{stage}: {num_reused} of {num_units} units were done already")
        if self._is_terminal and stage in self._ids:  # it was given up, and goes on
            self._bars.update(self._ids[stage], total=num_units, completed=num_reused)
        elif self._is_terminal:
            self._ids[stage] = self._bars.add_task(
                stage, total=num_units, completed=num_reused, note=""
            )
        else:
            self.say(f"{stage}: {num_units} units")

    def update(self, stage: str, num_done: int, latest: Mapping[str, Mapping[str, float]]) -> None:
        """Show the units done and, of those under way, the newest row each reported."""
        note = "; ".join(f"{unit} {_show(row)}" for unit, row in latest.items())
        if self._is_terminal:
            self._bars.update(self._ids[stage], completed=num_done, note=note)
        elif note and time.monotonic() >= self._next_line.get(stage, 0.0):
            self._next_line[stage] = time.monotonic() + LINE_EVERY_S
            self.say(f"{stage}: {num_done}/{self._num_units[stage]} units; {note}")

    def finished(self, stage: str, seconds: float, kept: str = "") -> None:
        """Say that a stage is done, and what of it did not have to be done."""
        if kept:
            self.say(f"{stage}: {kept}")
        if self._is_terminal:
            self._bars.update(self._ids[stage], completed=self._num_units[stage], note="")
            self._bars.stop_task(self._ids[stage])
        else:
            self.say(f"{stage}: done in {seconds:.1f} s")

    def failed(self, stage: str) -> None:
        self.say(f"{stage}: FAILED")


def _show(row: Mapping[str, float]) -> str:
    """A row in a few words: images seen, loss, speed."""
    words = []
    if "images" in row:
        words.append(f"{int(row['images']):,} images")
    if "loss" in row:
        words.append(f"loss {row['loss']:.3f}")
    if "images_per_s" in row:
        words.append(f"{row['images_per_s']:.0f}/s")
    return " ".join(words)
