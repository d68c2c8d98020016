"""The record of a run: what it did, whether it still goes on, and what a killed one left behind."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pipelines.errors import Damaged
from pipelines.jobs.submitted import JOB_VARIABLE
from pipelines.stage import Json
from pipelines.store import lease, pulse
from pipelines.store.ledger import Ledger
from pipelines.store.processes import Owner, process_start, process_table
from pipelines.store.stage_record import now
from pipelines.store.stopping import StopMark


@dataclass
class RunRecord:
    """What a run did; kept in the store as `runs/<run_id>.json`."""

    recipe: str
    resolved: Json
    run_id: str = ""
    state: str = "running"  # running | finished | failed | stopped | killed
    started: str = field(default_factory=now)
    ended: str = ""
    seconds: float = 0.0
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    process_started: float = field(default_factory=process_start)
    process_table: str = ""  # which one `pid` is of; "": an earlier version noted none
    planned: dict[str, str] = field(default_factory=dict)  # stage -> fingerprint, from the start
    stages: list[Json] = field(default_factory=list)
    tracking_uri: str = ""
    mlflow_run_id: str = ""
    mlflow_missed: int = 0  # calls; what it left open there is closed by the next run
    error: str = ""
    job: str = field(default_factory=lambda: os.environ.get(JOB_VARIABLE, ""))  # that it is of

    def __post_init__(self) -> None:
        if not self.run_id:
            stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
            self.run_id = f"{self.recipe}-{stamp}-{secrets.token_hex(2)}"

    @classmethod
    def read(cls, document: Json) -> RunRecord:
        """A record from the store.

        Raises:
            Damaged: this version does not know its fields.
        """
        try:
            return cls(**document)
        except TypeError as error:
            raise Damaged(
                f"runs/{document['run_id']}.json: another version of ediffi wrote this record "
                f"({error}); use that version, or move the file out of the store: no stage "
                "depends on it"
            ) from error

    @property
    def owner(self) -> Owner:
        """The run's driver."""
        return Owner(self.run_id, self.host, self.pid, self.process_started, self.process_table)

    @property
    def is_orphan(self) -> bool:
        """Whether the run's driver ran on this machine and is gone."""
        return self.state == "running" and self.owner.is_gone


def is_dead(ledger: Ledger, record: RunRecord) -> bool:
    """Whether a run that is noted as running has lost its driver, wherever that ran."""
    if record.state != "running" or record.is_orphan:
        return record.is_orphan
    is_elsewhere = (record.host, record.process_table) != (socket.gethostname(), process_table())
    return is_elsewhere and pulse.is_silent(ledger.store, record.run_id)


def is_driven(ledger: Ledger, run_id: str) -> bool:
    """Whether a run is under way, as far as can be seen from here."""
    try:
        record = RunRecord.read(ledger.record_of(run_id))
    except FileNotFoundError:
        return False
    return record.state == "running" and not is_dead(ledger, record)


def close_orphans(ledger: Ledger) -> list[str]:
    """Mark runs whose driver is gone as killed; clear what they left in flight. Returns ids."""
    records = [RunRecord.read(record) for record in ledger.runs()]
    killed = [record for record in records if is_dead(ledger, record)]
    for record in killed:
        record.state, record.ended = "killed", now()
        ledger.write_run(vars(record))
        for name, fingerprint in record.planned.items():
            lease.let_go_of(ledger.stage(name, fingerprint).directory, record.run_id)
        StopMark(ledger.store, record.run_id).remove()
    running = {record.run_id for record in records if record.state == "running"}
    for name in orphaned_scratch(ledger, running, {record.run_id for record in records}):
        ledger.discard_scratch_of(name)
    return [record.run_id for record in killed]


def orphaned_scratch(
    ledger: Ledger, running: AbstractSet[str], known: AbstractSet[str]
) -> list[str]:
    """Folders of work in flight that no run is at.

    Args:
        running: ids of runs under way; as long as there are any, what is nobody's stays.
        known: ids of all runs.
    """
    names = ledger.scratch_names() - running
    return sorted(names if not running else names & known)
