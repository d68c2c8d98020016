"""Training units: a gang of workers gathered by Ray Train, under torch.distributed.

Ray Train brings the processes up and together; resuming is the stage's own business through the
ledger, so a gang that dies is simply launched again. A unit with a single worker needs no
gathering and runs on the pool instead.
"""

from __future__ import annotations

import os
from typing import Any

import ray

from pipelines.cpu_settings import training_environment
from pipelines.execute import Task, execute
from pipelines.recipe import Resources
from pipelines.stage import Receipt


@ray.remote(num_cpus=0, max_retries=0)
def run_gang(task: Task, resources: Resources) -> Receipt:
    """Gather the gang, run the unit on all its workers, return the receipt that rank 0 wrote."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipelines.gang_backend import GangConfig

    trainer = TorchTrainer(
        _work,
        train_loop_config={"task": task},
        torch_config=GangConfig(backend="nccl" if resources.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker=_per_worker(resources),
        ),
        run_config=RunConfig(
            name=f"{task.fingerprint}-{task.unit.id}-{os.urandom(4).hex()}",
            storage_path=f"{task.store}/.scratch/ray-train",
            failure_config=FailureConfig(max_failures=0),
            worker_runtime_env={"env_vars": training_environment(resources)},
        ),
    )
    trainer.fit()
    receipt = task.record.receipt(task.unit.id)
    assert receipt is not None, f"{task.unit.id}: the gang ended without a receipt"
    return receipt


def _per_worker(resources: Resources) -> dict[str, float]:
    per_worker = {"CPU": resources.cpus}
    if resources.gpus:
        per_worker["GPU"] = resources.gpus
    return per_worker


def _work(config: dict[str, Any]) -> None:
    """What every worker of the gang runs."""
    import ray.train

    task: Task = config["task"]
    context = ray.train.get_context()
    execute(
        task,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        tell=lambda row: ray.train.report(dict(row)),
    )
