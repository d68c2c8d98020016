"""Asking Slurm: which job it is, where it stands, and to end it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

COMMAND_TIMEOUT_S = 60.0  # a controller that is down is reported after Slurm's own timeouts

_FIELD = re.compile(r"(?:^|\s)(JobState|Reason|Restarts|ExitCode|NodeList)=(\S*)")
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_RUNNING = ("CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING")
_FAILED = (
    *("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED"),
    "LAUNCH_FAILED",
)
_Name = Literal["waiting", "running", "finished", "failed", "cancelled", "unknown"]
_STATES: Mapping[str, _Name] = {
    **dict.fromkeys(_WAITING, "waiting"),
    **dict.fromkeys((*_RUNNING, "RESIZING", "STAGE_OUT"), "running"),
    **dict.fromkeys(_FAILED, "failed"),
    "COMPLETED": "finished",
    "CANCELLED": "cancelled",
}


class SlurmError(Exception):
    """Slurm cannot be asked, or refused; the message holds its words and the next step."""


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a job stands. `native` and `reason` are Slurm's own words.

    `exit_code` is the command's once the job is over, else 0; `num_requeues` counts how often it
    was queued again.
    """

    name: Literal["waiting", "running", "finished", "failed", "cancelled", "unknown"]
    native: str = ""
    reason: str = ""
    nodes: str = ""
    exit_code: int = 0
    num_requeues: int = 0


def state(job_id: str) -> State:
    """Ask where a job stands; `unknown` for one that Slurm has forgotten.

    Raises:
        SlurmError: Slurm does not answer.
    """
    try:
        told = ask("scontrol", "show", "job", "--oneliner", _number(job_id))
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        return _accounted(job_id)
    found = dict(_FIELD.findall(told))
    return State(
        name=native_state(found["JobState"]),
        native=found["JobState"],
        reason="" if found["Reason"] == "None" else found["Reason"],
        nodes="" if found["NodeList"] == "(null)" else found["NodeList"],
        exit_code=_exit_code(found["ExitCode"]),
        num_requeues=int(found["Restarts"]),
    )


def find(name: str) -> str:
    """The number of the newest job of that name, over or not; "" if Slurm knows none.

    Raises:
        SlurmError: Slurm does not answer.
    """
    told = ask("squeue", "--noheader", "--states=all", "--format=%A", f"--name={name}")
    return max(told.split(), key=int, default="")


def cancel(job_id: str, *, at_once: bool = False) -> None:
    """End a job. One that runs is told to save first, unless `at_once`; it ends within `save_s`.

    Raises:
        SlurmError: Slurm does not answer, or knows no such job.
    """
    if not at_once and state(job_id).native == "RUNNING":
        ask("scancel", "--batch", "--signal=USR2", _number(job_id))
    else:
        ask("scancel", _number(job_id))


def native_state(word: str) -> _Name:
    """What one of Slurm's own words for a job's state means to us."""
    return _STATES.get(word, "unknown")


def _accounted(job_id: str) -> State:
    """What Slurm's accounting remembers, where there is one."""
    try:
        columns = "--format=State,ExitCode,NodeList"
        told = ask("sacct", "-X", "-n", "-P", columns, f"--jobs={_number(job_id)}").strip()
    except SlurmError:  # no accounting here: nothing more can be known
        told = ""
    if not told:
        return State(name="unknown", reason="Slurm has forgotten this job")
    native, exit_code, nodes = told.splitlines()[-1].split("|")
    native = native.split()[0]  # CANCELLED by 1000
    return State(
        name=native_state(native),
        native=native,
        exit_code=_exit_code(exit_code),
        nodes=nodes,
    )


def _exit_code(text: str) -> int:
    """Of `CODE:SIGNAL`, as a shell tells it."""
    code, signal = (int(part) for part in text.split(":"))
    return 128 + signal if signal else code


def _number(job_id: str) -> str:
    if not job_id.isdecimal():
        raise SlurmError(f"a job of Slurm has a number, got {job_id!r}")
    return job_id


def ask(*words: str, text: str = "") -> str:
    """Run one of Slurm's commands; returns what it printed."""
    if shutil.which(words[0]) is None:
        raise SlurmError(
            f"{words[0]} is not on PATH: run this on a login node of the Slurm cluster"
        )
    try:
        answer = subprocess.run(
            words, input=text, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"{words[0]} got no answer in {COMMAND_TIMEOUT_S:g} s: is the controller up? "
            "`scontrol ping` says"
        ) from error
    if answer.returncode:
        told = answer.stderr.strip() or answer.stdout.strip() or f"exit code {answer.returncode}"
        raise SlurmError(f"{' '.join(words[:2])}: {told}")
    return answer.stdout
