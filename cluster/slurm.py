"""A job on Slurm: its script, written purely (`render`), and the few commands that send and ask.

The script gathers a Ray cluster from the nodes that Slurm gives, runs one command on the first of
them, and is safe to be queued again: what the command finished lies in the store, so that the same
script goes on. What happens when:

| Slurm, or we                    | the script | the command | and then              |
|---------------------------------|------------|-------------|-----------------------|
| the time limit is `save_s` away | hears USR1 | gets TERM   | queued again          |
| `cancel`                        | hears USR2 | gets TERM   | ends as CANCELLED     |
| preemption, `scancel`, requeue  | hears TERM | gets TERM   | as Slurm has decided  |
| nothing                         |            | exits 3     | queued again          |
| a node is lost                  |            |             | Slurm queues it again |

After `max_requeues` of these the script asks no more: what ends so often is no accident. Where the
script is not asked, as when a node is lost, Slurm goes on as its administrators have set it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from cluster.slurm_commands import SlurmError, State, ask, cancel, find, state
from cluster.slurm_script import script

__all__ = [
    "SlurmError",
    "SlurmJob",
    "State",
    "cancel",
    "find",
    "log_path",
    "render",
    "state",
    "submit",
]

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:=&|*@\[\]()+/-]*")
_PATH = re.compile(r"/[A-Za-z0-9_.,:=@+/-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OURS = frozenset(
    {"job-name", "nodes", "ntasks-per-node", "cpus-per-task", "mem", "gres", "time", "signal"}
    | {"partition", "account", "qos", "output", "error", "open-mode", "requeue", "no-requeue"}
    | {"chdir", "export", "ntasks", "array"}
)


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """One command, on a Ray cluster made of `num_nodes` equal nodes.

    Args:
        command: run on the first node with RAY_ADDRESS set; exit code 3 asks to be run again.
        log_dir: absolute, reached by every node under the same name; made by `submit`.
        directory: absolute; where the command's relative paths count from.
        python: the interpreter with Ray on every node, a path or a name on PATH.
        memory_per_node_gib, gpus_per_node, gpu_type: of one node; memory 0 is the node's whole.
        time_limit_min: of one run of the job; it goes on after being queued again.
        save_s: how long before the limit the command is told to save and leave.
        start_s: how long the nodes may take to join the Ray cluster.
        node_loss_s: after how long a node that does not answer is given up by Ray.
        watch_s: how often a run asks whether Slurm has queued the job again without it.
        node_group: the Ray label `ray.io/node-group` of all its nodes, which stages ask for.
        scratch_dir: a short path on each node's own disk, for Ray's files.
        setup: lines of shell run first on the head, such as `module load cuda`.
        environment: variables set for everything, in clear; no secrets.
        pass_environment: names of variables whose values come from the shell that submits.
        options: further options of sbatch, by their long names (`{"reservation": "monday"}`).
    """

    name: str
    command: tuple[str, ...]
    log_dir: str
    directory: str
    num_nodes: int = 1
    cpus_per_node: int = 1
    memory_per_node_gib: float = 0.0
    gpus_per_node: int = 0
    gpu_type: str = ""
    node_group: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    time_limit_min: int = 24 * 60
    save_s: int = 180
    max_requeues: int = 20
    start_s: int = 180
    node_loss_s: int = 20
    watch_s: int = 30
    object_store_gib: float = 0.0
    python: str = "python3"
    scratch_dir: str = "/tmp"
    setup: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    pass_environment: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_names(self)
        _check_numbers(self)
        _check_environment(self)
        for name in ("environment", "options"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))


def render(job: SlurmJob) -> str:
    """Return the script for sbatch; equal jobs give equal bytes."""
    return script(job)


def log_path(job: SlurmJob, job_id: str) -> Path:
    """Where the script and its command write; Ray's nodes write beside it."""
    return Path(job.log_dir) / f"{job.name}-{job_id}.log"


def submit(job: SlurmJob) -> str:
    """Queue the job; returns Slurm's number for it.

    Raises:
        SlurmError: sbatch is absent or refused, or a variable to pass on is not set.
    """
    for name in job.pass_environment:
        if name not in os.environ:
            raise SlurmError(
                f"pass_environment: {name} is not set in this shell: export it, then submit again"
            )
    try:
        Path(job.log_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SlurmError(f"log_dir: cannot make {job.log_dir}: {error}") from error
    return ask("sbatch", "--parsable", text=render(job)).strip().split(";")[0]


# -- checks ----------------------------------------------------------------------------------------


def _check_names(job: SlurmJob) -> None:
    """What stands in a line of #SBATCH, where nothing can be quoted safely."""
    if not isinstance(job.name, str) or not _NAME.fullmatch(job.name):
        raise ValueError(
            f"name must be 1 to 63 lower-case letters, digits and inner hyphens, got {job.name!r}"
        )
    if isinstance(job.command, str) or not job.command:
        raise ValueError(f"command must be a sequence of words, got {job.command!r}")
    for name in ("log_dir", "directory", "scratch_dir"):
        value = getattr(job, name)
        if not isinstance(value, str) or not _PATH.fullmatch(value):
            raise ValueError(
                f"{name} must be an absolute path without spaces, quotes or %, got {value!r}"
            )
    if len(job.scratch_dir) > _MAX_SCRATCH_LENGTH:
        raise ValueError(
            f"scratch_dir must have at most {_MAX_SCRATCH_LENGTH} characters, got "
            f"{job.scratch_dir!r}: Ray's sockets lie below it, and their paths are limited"
        )
    words = {name: getattr(job, name) for name in ("partition", "account", "qos", "gpu_type")}
    words |= {"node_group": job.node_group}
    words |= {f"options.{name}": value for name, value in job.options.items()}
    for name, value in words.items():
        if not isinstance(value, str) or (value and not _WORD.fullmatch(value)):
            raise ValueError(f"{name} must be one word, got {value!r}")
    for name in job.options:
        if name in _OURS or not re.fullmatch(r"[a-z][a-z-]*", name):
            raise ValueError(
                f"options: {name!r} is not for here: it has a field of its own, is needed as it "
                "is, or is no long name of an option of sbatch"
            )


_MAX_SCRATCH_LENGTH = 20


def _check_numbers(job: SlurmJob) -> None:
    least = {"num_nodes": 1, "cpus_per_node": 1, "gpus_per_node": 0, "time_limit_min": 1}
    least |= {"save_s": 10, "max_requeues": 0, "start_s": 1, "node_loss_s": 4, "watch_s": 1}
    for name, minimum in least.items():
        value = getattr(job, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}")
    for name in ("memory_per_node_gib", "object_store_gib"):
        value = getattr(job, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
            raise ValueError(f"{name} must be a number of GiB, got {value!r}: write 24, not 24Gi")
    if job.gpu_type and not job.gpus_per_node:
        raise ValueError(f"gpu_type is {job.gpu_type!r} but gpus_per_node is 0: say how many")
    if job.save_s >= 60 * job.time_limit_min:
        raise ValueError(
            f"save_s must be shorter than time_limit_min, got {job.save_s} s of "
            f"{job.time_limit_min} min"
        )


def _check_environment(job: SlurmJob) -> None:
    for name in (*job.environment, *job.pass_environment):
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
            raise ValueError(f"environment: {name!r} is no name of an environment variable")
    for name, value in job.environment.items():
        if not isinstance(value, str) or "\0" in value:
            raise ValueError(f"environment.{name} must be text, got {value!r}")
    for line in job.setup:
        if not isinstance(line, str) or "\n" in line:
            raise ValueError(f"setup must be single lines of shell, got {line!r}")
