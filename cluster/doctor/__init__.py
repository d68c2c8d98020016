"""What `ediffi doctor` asks of a machine before a run does: one function, one question.

Every check returns a `Finding`, also when the answer is no, and tells the remedy. Nothing here
imports what it asks about: versions come from package metadata, accelerators from nvidia-smi,
weights from the file system, so that a doctor's visit takes no longer than the slowest time-out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster.doctor.clock import check_clock
from cluster.doctor.finding import TIMEOUT_S, Finding, nearest_directory, reason
from cluster.doctor.machine import (
    check_accelerators,
    check_cpus,
    check_free_disk,
    check_memory,
    check_packages,
    check_python,
    check_shared_memory,
    check_standard_library,
)
from cluster.doctor.place import check_place
from cluster.doctor.stages import UnitNeeds, check_stages
from cluster.doctor.tracking import check_tracking
from cluster.doctor.weights import check_weights

__all__ = [
    "TIMEOUT_S",
    "Finding",
    "Needs",
    "NodeNeeds",
    "UnitNeeds",
    "check_clock",
    "check_place",
    "check_stages",
    "examine",
    "examine_node",
    "nearest_directory",
    "reason",
]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run needs of the machine it starts on.

    `weights` maps a name for people ("t5") to where an encoder's weights are, as `check_weights`
    reads it. `lock_path` is the requirements.lock to compare the installed packages with.
    `disk_path` is where room is needed: the store, or beside a bucket the temporary files.
    """

    disk_path: Path
    lock_path: Path
    tracking_uri: str
    weights: Mapping[str, str] = field(default_factory=dict)
    free_disk_gib: float = 10.0
    free_disk_why: str = ""
    memory_gib: float = 4.0
    shared_memory_gib: float = 1.0
    num_cpus: int = 2
    num_accelerators: int = 0


@dataclass(frozen=True, kw_only=True)
class NodeNeeds:
    """What a run needs of each node of a cluster that is up; accelerators are as many as it says.

    `disk_path` is where work in flight lies.
    """

    disk_path: Path
    num_accelerators: int = 0
    weights: Mapping[str, str] = field(default_factory=dict)
    free_disk_gib: float = 1.0
    shared_memory_gib: float = 1.0


def examine_node(needs: NodeNeeds) -> list[Finding]:
    """Ask a node what `examine` asks of the machine that a run starts on."""
    return [
        check_shared_memory(needs.shared_memory_gib),
        check_accelerators(needs.num_accelerators),
        check_free_disk(needs.disk_path, needs.free_disk_gib, "for work in flight"),
        *(check_weights(name, location) for name, location in needs.weights.items()),
    ]


def examine(needs: Needs) -> list[Finding]:
    """Ask every question; the findings come in the order in which to mend them."""
    return [
        check_python(),
        check_standard_library(),
        check_packages(needs.lock_path),
        check_cpus(needs.num_cpus),
        check_memory(needs.memory_gib),
        check_shared_memory(needs.shared_memory_gib),
        check_accelerators(needs.num_accelerators),
        check_free_disk(needs.disk_path, needs.free_disk_gib, needs.free_disk_why),
        *check_tracking(needs.tracking_uri),
        *(check_weights(name, location) for name, location in needs.weights.items()),
    ]
