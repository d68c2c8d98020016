"""What units in flight write into their durable folders, passed on to the terminal and MLflow."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from pipelines.driver.progress import Progress
from pipelines.driver.stage_state import StageState
from pipelines.store.outages import why_it_failed
from pipelines.tracking.tracker import Tracker
from pipelines.worker.durable import Reports, grids_in, read_reports
from pipelines.worker.execute import Task

SHOW_S = 1.0


class UnitReports:
    """Passes on rows, words and pictures of units, each once.

    A new driver tells MLflow everything, for its runs there are new; people have read the notices
    of earlier attempts already.
    """

    def __init__(self, tracker: Tracker, progress: Progress) -> None:
        self._tracker, self._progress = tracker, progress
        self._next_show = 0.0
        self._is_blind = False

    def show(
        self,
        states: Iterable[StageState],
        in_flight: Iterable[tuple[StageState, Task]],
        *,
        force: bool = False,
    ) -> None:
        """Pass on what units have reported since last time, and how far each stage is."""
        if not force and time.monotonic() < self._next_show:
            return
        self._next_show = time.monotonic() + SHOW_S
        latest: dict[str, dict[str, Mapping[str, float]]] = {}
        for owner, task in in_flight:
            if owner.can_stop and (rows := self.send(owner, task)):  # others report when they end
                latest.setdefault(owner.name, {})[task.unit.id] = rows[-1]
        for state in states:
            if state.state == "running":
                self._progress.update(state.name, state.num_done, latest.get(state.name, {}))

    def begin(self, state: StageState, task: Task) -> None:
        """Look what is old before an attempt begins; only training writes notices and pictures."""
        if state.can_stop:
            old = self._read(task).notices
            state.notices_told.setdefault(task.unit.id, set()).update(old)

    def send(self, state: StageState, task: Task) -> list[dict[str, float]]:
        """Pass on what is new; returns all rows."""
        unit = task.unit.id
        reports = self._read(task)
        told = state.notices_told.setdefault(unit, set())
        for notice in reports.notices:
            if notice not in told:
                told.add(notice)
                self._progress.say(f"{state.name}/{unit}: {notice}")
        if reports.rows:
            self._send_rows(state, task, reports.rows)
        return reports.rows

    def _read(self, task: Task) -> Reports:
        """What a unit has reported; nothing while the store fails, for it is only to be shown."""
        try:
            reports = read_reports(task.durable_path)
        except Exception as error:  # each store has its own
            if (why := why_it_failed(error, task.durable_path)) is None:
                raise
            if not self._is_blind:
                name = f"{task.stage.name}/{task.unit.id}"
                self._progress.say(f"{name}: its progress cannot be shown for now: {why}")
            self._is_blind = True
            return Reports([], [])
        self._is_blind = False
        return reports

    def _send_rows(self, state: StageState, task: Task, rows: list[dict[str, float]]) -> None:
        unit = task.unit.id
        num_sent = min(state.num_rows_sent.get(unit, 0), len(rows))
        if rows[num_sent:]:
            name = unit if state.num_units > 1 else ""
            self._tracker.progress(state.name, name, rows[num_sent:])
            if state.can_stop:  # a grid lies there before the row of its moment is reported
                self._send_grids(state, task)
        state.num_rows_sent[unit] = len(rows)
        state.curves[unit] = rows

    def _send_grids(self, state: StageState, task: Task) -> None:
        sent = state.grids_sent.setdefault(task.unit.id, set())
        found = grids_in(task.durable_path)
        if new := {name: found[name] for name in found if name not in sent}:
            self._tracker.grids(state.name, task.unit.id, new)
            sent.update(new)
