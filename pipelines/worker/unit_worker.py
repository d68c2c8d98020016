"""What a warm actor is; it stands apart so that its process imports no more than it needs."""

from __future__ import annotations

from pipelines.stage import Receipt
from pipelines.worker.execute import Task, execute


class UnitWorker:
    """A process that does one unit after another."""

    def begin(self) -> None:
        """Answers once the process is there."""

    def run(self, task: Task) -> Receipt | None:
        return execute(task)
