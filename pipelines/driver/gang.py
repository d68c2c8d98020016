"""Training units: a gang of workers gathered by Ray Train, under torch.distributed.

Ray Train brings the processes up and together; resuming is the stage's own business through the
ledger, so a gang that dies is simply launched again. A unit with a single worker needs no
gathering and runs on the pool instead.
"""

from __future__ import annotations

import os
from typing import Any

import ray

from pipelines.driver.cpu_settings import training_environment
from pipelines.driver.ray_cluster import label_selector, wanted
from pipelines.recipe_sections.resources import Resources
from pipelines.stage import Receipt
from pipelines.store.location import Location, location, write_atomically
from pipelines.worker.execute import Task, execute


class Gang:
    """One gathering: where Ray Train keeps what it likes, and where the gang says that it began.

    Args:
        scratch: the run's own folder of what is in flight.
    """

    def __init__(self, scratch: Location, task: Task) -> None:
        name = f"{task.fingerprint}-{task.unit.id}-{task.attempt}-{os.urandom(4).hex()}"
        self._task, self._folder, self._name = task, scratch / "ray-train", name

    def start(self, resources: Resources) -> ray.ObjectRef:
        return run_gang.remote(self._task, resources, str(self._folder), self._name)

    @property
    def has_begun(self) -> bool:
        """Whether all workers are there and have set out."""
        return _mark(self._folder, self._name).exists()

    def end(self, reference: ray.ObjectRef) -> None:
        """End its processes at once: those of Ray Train go with the task that started them."""
        ray.cancel(reference, force=True)


@ray.remote(num_cpus=0, max_retries=0)
def run_gang(task: Task, resources: Resources, folder: str, name: str) -> Receipt:
    """Gather the gang, run the unit on all its workers, return the receipt that rank 0 wrote."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipelines.driver.gang_backend import GangConfig

    trainer = TorchTrainer(
        _work,
        train_loop_config={"task": task, "folder": folder, "name": name},
        torch_config=GangConfig(backend="nccl" if resources.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker=wanted(resources),
            placement_strategy=resources.placement.upper(),
            label_selector=label_selector(resources) or None,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            failure_config=FailureConfig(max_failures=0),
            worker_runtime_env={"env_vars": training_environment(resources)},
        ),
    )
    trainer.fit()
    receipt = task.record.receipt(task.unit.id)
    assert receipt is not None, f"{task.unit.id}: the gang ended without a receipt"
    return receipt


def _work(config: dict[str, Any]) -> None:
    """What every worker of the gang runs."""
    import ray.train

    task: Task = config["task"]
    context = ray.train.get_context()
    if context.get_world_rank() == 0:
        write_atomically(_mark(location(config["folder"]), config["name"]), "")
    execute(
        task,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        tell=lambda row: ray.train.report(dict(row)),
    )


def _mark(folder: Location, name: str) -> Location:
    return folder / f"{name}.begun"
