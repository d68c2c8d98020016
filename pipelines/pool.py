"""Warm Ray actors for the units that need no gang.

An actor serves any stage whose units want the same resources, one unit at a time, and keeps its
process: torch stays imported and encoders stay loaded from one shard to the next.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import ray

from pipelines.cpu_settings import training_environment
from pipelines.execute import Task, execute
from pipelines.recipe import Resources
from pipelines.stage import Receipt


class Shape(NamedTuple):
    """What a worker process is made with."""

    cpus: float
    gpus: float
    environment: tuple[tuple[str, str], ...] = ()


class UnitWorker:
    """A process that does one unit after another."""

    def run(self, task: Task) -> Receipt | None:
        return execute(task)


_RemoteWorker = ray.remote(UnitWorker)


class WorkerPool:
    """Actors by shape; grown while the cluster has room, retired when idle."""

    def __init__(self) -> None:
        self._idle: dict[Shape, list[ray.actor.ActorHandle]] = {}
        self._busy: dict[ray.ObjectRef, tuple[Shape, ray.actor.ActorHandle]] = {}
        self._num_actors: Counter[Shape] = Counter()

    def dispatch(self, task: Task, resources: Resources) -> ray.ObjectRef | None:
        """Start a task on a free worker; None if there is none and no room for another."""
        environment = training_environment(resources) if task.stage.gang else {}
        shape = Shape(resources.cpus, resources.gpus, tuple(environment.items()))
        idle = self._idle.setdefault(shape, [])
        if not idle:
            if not self._has_room(shape):
                self.retire_idle()  # workers of an earlier stage's shape may sit on the room
            if not self._has_room(shape):
                return None
            idle.append(_start(shape))
            self._num_actors[shape] += 1
        worker = idle.pop()
        reference = worker.run.remote(task)
        self._busy[reference] = (shape, worker)
        return reference

    def release(self, reference: ray.ObjectRef, *, lost: bool) -> None:
        """Take a worker back after its task; one that is dead or about to go is given up."""
        shape, worker = self._busy.pop(reference)
        if lost:
            ray.kill(worker)
            self._num_actors[shape] -= 1
        else:
            self._idle[shape].append(worker)

    def retire_idle(self) -> None:
        """End idle workers, so that others get their CPUs."""
        for shape, workers in self._idle.items():
            for worker in workers:
                ray.kill(worker)
            self._num_actors[shape] -= len(workers)
            workers.clear()

    def _has_room(self, shape: Shape) -> bool:
        """Room beside our own actors; a new actor may wait for others' work to end."""
        cluster = ray.cluster_resources()
        for kind, field in (("CPU", "cpus"), ("GPU", "gpus")):
            each: float = getattr(shape, field)
            held = sum(num * getattr(other, field) for other, num in self._num_actors.items())
            if each and held + each > cluster.get(kind, 0):
                return False
        return True


def _start(shape: Shape) -> ray.actor.ActorHandle:
    return _RemoteWorker.options(
        num_cpus=shape.cpus,
        num_gpus=shape.gpus,
        runtime_env={"env_vars": dict(shape.environment)} if shape.environment else None,
    ).remote()
