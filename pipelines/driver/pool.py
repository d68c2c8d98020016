"""Warm Ray actors for the units that need no gang.

An actor serves any stage whose units want the same resources, one unit at a time, and keeps its
process: torch stays imported and encoders stay loaded from one shard to the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import ray

from pipelines.driver.cpu_settings import training_environment
from pipelines.driver.ray_cluster import actor_options, is_joined, nodes_of, wanted
from pipelines.recipe_sections.resources import Resources
from pipelines.worker.execute import Task
from pipelines.worker.unit_worker import UnitWorker

MOST_AHEAD = 16  # workers of one shape asked for although there is no room
MOST_FAILURES = 5  # workers of one shape that never came, before a unit fails by it


class Shape(NamedTuple):
    """What a worker process is made with."""

    resources: tuple[tuple[str, float], ...]  # by Ray's names
    node_group: str = ""
    environment: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, resources: Resources, environment: dict[str, str]) -> Shape:
        return cls(
            tuple(wanted(resources).items()), resources.node_group, tuple(environment.items())
        )


class Started(NamedTuple):
    """A unit that was given to a worker; `begins` is done when the worker has answered again."""

    reference: ray.ObjectRef
    begins: ray.ObjectRef


class _Arriving(NamedTuple):
    """A worker that was asked for; `is_ahead` if there was no room for it when it was."""

    shape: Shape
    worker: ray.actor.ActorHandle
    is_ahead: bool


class WorkerPool:
    """Actors by shape; grown while the cluster has room, retired when idle.

    A unit is only given to an actor that is there: one for which there is no room holds nothing up.
    On others' cluster a few more are asked for than there is room for, for that is what makes
    the cluster grow, or gives us what somebody else lets go.
    """

    def __init__(self) -> None:
        self._idle: dict[Shape, list[ray.actor.ActorHandle]] = {}
        self._busy: dict[ray.ObjectRef, tuple[Shape, ray.actor.ActorHandle]] = {}
        self._arriving: dict[ray.ObjectRef, _Arriving] = {}
        self._num_actors: Counter[Shape] = Counter()  # for which there is room
        self._failures: dict[Shape, list[Exception]] = {}  # of those that never came, in a row

    @property
    def arriving(self) -> list[ray.ObjectRef]:
        """Each is done when a worker that was asked for is there, or never will be."""
        return list(self._arriving)

    def num_arriving(self, shape: Shape) -> int:
        return sum(one.shape == shape for one in self._arriving.values())

    def dispatch(self, task: Task, resources: Resources) -> Started | None:
        """Start a task on a free worker; None if there is none."""
        self._welcome()
        shape = shape_of(task, resources)
        if not (idle := self._idle.get(shape)):
            return None
        worker = idle.pop()
        begins = worker.begin.remote()
        reference = worker.run.remote(task)
        self._busy[reference] = (shape, worker)
        return Started(reference, begins)

    def hire(self, shape: Shape, resources: Resources) -> bool:
        """Ask for one more worker; False if that would lead nowhere now."""
        has_room = self._has_room(shape)
        if not has_room and (others := set(self._idle) - {shape}):  # they may sit on the room
            for other in others:
                self._retire_idle(other)
            has_room = self._has_room(shape)
        if not has_room and not self._may_ask_ahead(shape):
            return False
        worker = _start(shape, resources)
        self._arriving[worker.begin.remote()] = _Arriving(shape, worker, is_ahead=not has_room)
        self._num_actors[shape] += has_room
        return True

    def _may_ask_ahead(self, shape: Shape) -> bool:
        """Whether the cluster may grow by it: a worker that takes nothing would come at once."""
        takes_something = any(each for _, each in shape.resources)
        num_ahead = sum(one.is_ahead and one.shape == shape for one in self._arriving.values())
        return takes_something and is_joined() and num_ahead < MOST_AHEAD

    def make_way(self, wanted: Mapping[Shape, int]) -> None:
        """While workers are waited for, end those that nobody waits for: they may sit on the room.

        Args:
            wanted: workers of each shape that units wait for.
        """
        for begins, one in reversed(list(self._arriving.items())):
            if self.num_arriving(one.shape) > wanted.get(one.shape, 0):
                self._dismiss(begins)
        if self._arriving:  # who is idle now has no unit: those were given out before
            for shape in list(self._idle):
                self._retire_idle(shape)

    def refusal(self, shape: Shape) -> Exception | None:
        """Why workers of a shape do not come, if several in a row have not; asked once."""
        failures = self._failures.get(shape, [])
        if len(failures) < MOST_FAILURES:
            return None
        del self._failures[shape]
        return failures[-1]

    def release(self, reference: ray.ObjectRef, *, lost: bool) -> None:
        """Take a worker back after its task; one that is dead or must go is ended."""
        shape, worker = self._busy.pop(reference)
        if lost:
            ray.kill(worker)
            self._num_actors[shape] -= 1
        else:
            self._idle.setdefault(shape, []).append(worker)

    def retire(self) -> None:
        """End workers that have nothing to do, and do not wait for more: others get their CPUs."""
        for begins in list(self._arriving):
            self._dismiss(begins)
        for shape in list(self._idle):
            self._retire_idle(shape)

    def _welcome(self) -> None:
        """Take in the workers that have come."""
        if not self._arriving:
            return
        ready, _ = ray.wait(self.arriving, num_returns=len(self._arriving), timeout=0)
        for begins in ready:
            shape, worker, is_ahead = self._arriving.pop(begins)
            try:
                ray.get(begins)
            except ray.exceptions.RayError as error:
                self._num_actors[shape] -= not is_ahead
                self._failures.setdefault(shape, []).append(error)
            else:
                self._num_actors[shape] += is_ahead
                self._failures.pop(shape, None)
                self._idle.setdefault(shape, []).append(worker)

    def _dismiss(self, begins: ray.ObjectRef) -> None:
        one = self._arriving.pop(begins)
        self._num_actors[one.shape] -= not one.is_ahead
        ray.kill(one.worker)

    def _retire_idle(self, shape: Shape) -> None:
        idle = self._idle.pop(shape, [])
        for worker in idle:
            ray.kill(worker)
        self._num_actors[shape] -= len(idle)

    def _has_room(self, shape: Shape) -> bool:
        """Room beside our own actors; a new actor may wait for others' work to end."""
        nodes = nodes_of(shape.node_group)
        fits = sum(_num_fitting(node, shape) for node in nodes)
        held: Counter[str] = Counter()
        for other, num in self._num_actors.items():
            if other.node_group == shape.node_group:
                held.update({kind: num * each for kind, each in other.resources})
        return self._num_actors[shape] < fits and all(
            held[kind] + each <= sum(node.get(kind, 0) for node in nodes)
            for kind, each in shape.resources
        )


def _num_fitting(node: Mapping[str, float], shape: Shape) -> int:
    """Workers that an empty node holds; those that take nothing are counted by its CPUs."""
    asked = [(kind, each) for kind, each in shape.resources if each] or [("CPU", 1.0)]
    return min(int(node.get(kind, 0) / each + 1e-6) for kind, each in asked)


def shape_of(task: Task, resources: Resources) -> Shape:
    """What a worker for a unit must be made with."""
    return Shape.of(resources, training_environment(resources) if task.stage.gang else {})


def _start(shape: Shape, resources: Resources) -> ray.actor.ActorHandle:
    return (
        ray.remote(UnitWorker)
        .options(
            **actor_options(resources),
            runtime_env={"env_vars": dict(shape.environment)} if shape.environment else None,
        )
        .remote()
    )
