"""Doing one unit: the same code on a pool worker, in a training gang and in a test.

A `Task` is small enough to send to any node; the worker opens the ledger by itself and publishes
what it made, so a driver that dies meanwhile loses nothing that was published.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import UserError
from pipelines.stage import Manifest, Receipt, Stage, Unit, Workspace, keep_folders_in
from pipelines.store import lease
from pipelines.store.fingerprint import changed_parts
from pipelines.store.lease import Fenced
from pipelines.store.ledger import Ledger
from pipelines.store.location import Location, is_remote
from pipelines.store.outages import as_retryable
from pipelines.store.stage_record import StageRecord
from pipelines.store.stopping import LOOK_IN_BUCKET_S, LOOK_S, StopListener
from pipelines.worker.durable import Durable
from pipelines.worker.unit_log import unit_log

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One unit of one stage, with the addresses of all it reads.

    `earlier` are older fingerprints of the stage, newest first, that may hold the unit already.
    """

    store: str
    stage: Stage
    fingerprint: str
    inputs: Mapping[str, str]
    unit: Unit
    attempt: int = 1
    run_id: str = ""  # whose word to end counts
    device: str = "cpu"
    earlier: tuple[str, ...] = ()
    is_retry: bool = False  # do the unit again although its receipt holds
    token: int = 0  # of the driver's lease on the stage; 0: nobody guards it

    @property
    def record(self) -> StageRecord:
        return Ledger.at(self.store).stage(self.stage.name, self.fingerprint)

    @property
    def durable_path(self) -> Location:
        return self.record.durable_path(self.unit.id)

    def check(self) -> None:
        """Raise Fenced if another driver or attempt has taken the unit over."""
        lease.check(self.record.directory, self.token, self.unit.id, self.attempt)


def execute(
    task: Task,
    *,
    rank: int = 0,
    world_size: int = 1,
    tell: Callable[[Mapping[str, float]], None] = lambda row: None,
) -> Receipt | None:
    """Run the unit and publish it. In a gang every rank runs, rank 0 publishes.

    Args:
        tell: also given every row that the unit reports, on every rank.

    Returns:
        The receipt (also when the unit was done already), None on ranks other than 0.

    Raises:
        ediffi.train.stop.Stopped: the unit was told to end, and has kept its state.
        Fenced: another driver or attempt has taken the unit over; nothing was published.
        RetryableError: the store failed.
        UserError: a gang of several workers works on an object store.
    """
    ledger = Ledger.at(task.store)
    with as_retryable(ledger.store, f"{task.stage.name}/{task.unit.id}"):
        return _execute(task, ledger, rank, world_size, tell)


def _execute(
    task: Task,
    ledger: Ledger,
    rank: int,
    world_size: int,
    tell: Callable[[Mapping[str, float]], None],
) -> Receipt | None:
    record = task.record
    if world_size > 1 and is_remote(ledger.store):
        raise UserError(
            f"resources.{task.stage.name}.num_workers must be 1 on {ledger.store}, got "
            f"{world_size}: workers share their checkpoints through the store; use a file system "
            "that every node mounts"
        )
    before = record.receipt(task.unit.id)
    earlier = [ledger.stage(task.stage.name, address) for address in task.earlier]
    if not task.is_retry:
        if before is not None and before.key == task.unit.key:
            return before
        if (donor := _donor(task.unit, earlier)) is not None:
            return record.take_over(*donor, token=task.token, attempt=task.attempt)
    with ExitStack() as stack:
        stack.enter_context(unit_log(task, rank=rank))
        task.check()
        ledger.discard_local_scratch_of_ended()
        durable = stack.enter_context(
            Durable(
                task.durable_path,
                may_copy=task.check,
                new_folder=lambda: ledger.new_scratch(task.run_id),
            )
        )
        scratch = stack.enter_context(_scratch(ledger, task.run_id))
        keep_folders_in(ledger.local_scratch_of(task.run_id))
        if rank == 0:
            stack.enter_context(_warnings_to(durable.notice))

        def report(row: Mapping[str, float]) -> None:
            if rank == 0:
                durable.report(row)
            tell(row)

        workspace = Workspace(
            scratch=scratch,
            durable=durable.path,
            inputs=_Inputs(ledger, task.inputs),
            attempt=task.attempt,
            device=task.device,
            rank=rank,
            world_size=world_size,
            previous=before if task.is_retry else None,
            directory=record.directory,
            report=report,
            notice=durable.notice if rank == 0 else _nobody,
            should_stop=_Watch(task, StopListener.of(ledger.store, task.run_id, rank=rank), rank),
        )
        return _run(task, workspace, reason=_reason(task, before, earlier))


def _run(task: Task, workspace: Workspace, *, reason: str) -> Receipt | None:
    """Do the unit; on rank 0 publish it."""
    start = time.monotonic()
    outcome = task.stage.run(task.unit, workspace)
    if workspace.rank != 0:
        return None
    return task.record.publish(
        task.unit,
        outcome,
        workspace.scratch,
        seconds=time.monotonic() - start,
        attempt=task.attempt,
        reason=reason,
        token=task.token,
    )


class _Inputs(Mapping[str, Manifest]):
    """Manifests of a stage's inputs, each read when first asked for."""

    def __init__(self, ledger: Ledger, addresses: Mapping[str, str]) -> None:
        self._ledger, self._addresses = ledger, addresses
        self._manifests: dict[str, Manifest] = {}

    def __getitem__(self, name: str) -> Manifest:
        if name not in self._manifests:
            record = self._ledger.stage(name, self._addresses[name])
            self._manifests[name] = record.manifest()
        return self._manifests[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._addresses)

    def __len__(self) -> int:
        return len(self._addresses)


class _Watch:
    """Says whether to stop; breaks off work that was taken over, before it writes a checkpoint.

    Two writers in one durable folder would be bad for both.
    """

    def __init__(self, task: Task, listener: StopListener, rank: int) -> None:
        self._task, self._listener = task, listener
        self._look_s = LOOK_IN_BUCKET_S if "://" in task.store else LOOK_S
        self._next_look = time.monotonic() if rank == 0 else float("inf")

    def __call__(self) -> bool:
        if time.monotonic() >= self._next_look:
            try:
                self._task.check()
            except Fenced:
                raise
            except Exception as error:  # each store has its own; publishing looks again
                _log.warning("could not look whether the lease holds: %s", error)
            self._next_look = time.monotonic() + self._look_s
        return self._listener()


@contextmanager
def _scratch(ledger: Ledger, run_id: str) -> Iterator[Path]:
    path = ledger.new_scratch(run_id)
    try:
        yield path
    finally:
        ledger.discard_scratch(path)


def _nobody(text: str) -> None:
    """Rank 0 speaks for all."""


@contextmanager
def _warnings_to(tell: Callable[[str], None]) -> Iterator[None]:
    """Tell what training logs as a warning, such as a damaged checkpoint or a spike."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: tell(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ediffi.train")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _donor(unit: Unit, earlier: list[StageRecord]) -> tuple[Receipt, StageRecord] | None:
    """What an earlier fingerprint made of the same inputs under the same settings."""
    for record in earlier if unit.key else ():
        receipt = record.receipt(unit.id)
        if receipt is not None and receipt.key == unit.key and record.holds(receipt):
            return receipt, record
    return None


def _reason(task: Task, before: Receipt | None, earlier: list[StageRecord]) -> str:
    """Why a unit was done although it, or an older one of its name, had been done before."""
    if task.is_retry:
        return "retry"
    found = (record.receipt(task.unit.id) for record in earlier)
    other = before or next((receipt for receipt in found if receipt is not None), None)
    if other is None:
        return ""
    return ", ".join(changed_parts(other.key, task.unit.key)) + " changed"
