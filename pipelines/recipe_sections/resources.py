"""What a unit of a stage takes, where it is placed, and how stubbornly it is tried.

None of it enters a fingerprint: work that is done stays done, whatever it took.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator

from pipelines.recipe_sections.data import NonNegative, Positive, Section

Placement = Literal["pack", "spread", "strict_pack", "strict_spread"]
Seconds = Positive | Literal["none"]
BUILT_IN = (
    "CPU",
    "GPU",
    "memory",
    "object_store_memory",
)  # Ray's own names, which fields stand for


class Resources(Section):
    """What one unit of a stage takes, and how it is tried again.

    `custom` are resources that a cluster's nodes were started with, and what each worker takes of
    them. `node_group` is the group of nodes that workers go to: those whose Ray label
    `ray.io/node-group` is that word.
    """

    num_workers: PositiveInt = 1  # workers of one training gang
    cpus: NonNegative = 1.0  # these, to `custom`, count for each worker
    gpus: NonNegative = 0.0
    memory_gib: NonNegative = 0.0  # kept free for it on its node; 0: not asked for
    custom: Mapping[str, Positive] = {}
    node_group: Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?)?$")] = ""
    placement: Placement = "pack"  # of a gang: on few nodes, or on many; strict: or not at all
    attempts: PositiveInt = 3
    backoff_s: NonNegative = 1.0  # before the second attempt; doubles with each further one
    timeout_s: Seconds = "none"  # a unit that takes longer is ended: one attempt is spent
    start_deadline_s: Seconds = 1800.0  # a unit must have found its workers by then
    stop_deadline_s: Positive = 60.0  # when the run is told to end, training may save so long
    on_failure: Literal["finish", "stop"] = "finish"  # what becomes of the stage's other units
    job: Literal["run", "own"] = "run"  # own: a Ray Job drives the stage, on a cluster of others

    @field_validator("custom")
    @classmethod
    def _not_built_in(cls, value: Mapping[str, float]) -> Mapping[str, float]:
        for name in value:
            if name in BUILT_IN:
                raise ValueError(f"{name!r} is no custom resource: use cpus, gpus or memory_gib")
        return value
