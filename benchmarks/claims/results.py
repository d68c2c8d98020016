"""Jobs in processes of their own, their results kept in files: what is done is not done again."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ediffi.sampling import SamplingConfig

SAMPLING = SamplingConfig(sampler="dpm++2m", num_steps=20, guidance=2.5, batch_pictures=32)
_PROCESSES = 2


class Job(Protocol):
    """A frozen dataclass that says what is to be done, and can do it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def run(self, results: Results) -> dict[str, Tensor]:
        """Do it; one tensor, under its name. `results` has those of earlier jobs."""
        ...


class Results:
    """Results of jobs, below a folder under a digest of what was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def make(self, jobs: Sequence[Job], tell: Callable[[str], None]) -> None:
        """Do the jobs that are not done, two at a time; none may need another of them."""
        missing = [job for job in dict.fromkeys(jobs) if not self.path(job).exists()]
        tell(f"{len(missing)} of {len(set(jobs))} jobs to do")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(_PROCESSES, mp_context=context) as pool:
            done = pool.map(_do, missing, [self.folder] * len(missing))
            for number, _ in enumerate(done, start=1):
                tell(f"{number}/{len(missing)}")

    def __getitem__(self, job: Job) -> Tensor:
        """The one tensor that a job made."""
        (tensor,) = load_file(self.path(job)).values()
        return tensor

    def path(self, job: Job) -> Path:
        """Where the result of a job lies, or will."""
        text = json.dumps([type(job).__name__, asdict(job), asdict(SAMPLING)], sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.safetensors"


def _do(job: Job, folder: Path) -> None:
    torch.set_num_threads(1)
    results = Results(folder)
    aside = results.path(job).with_suffix(".partial")
    save_file(job.run(results), aside)
    aside.replace(results.path(job))
