"""One way to every scheduler: `render` is pure and shows what `submit` would send.

`state`, `logs` and `cancel` take the profile and the id that `submit` returned. All but `render`
raise SchedulerError where the scheduler cannot be asked, or refuses.
"""

from collections.abc import Iterator
from typing import Protocol

from cluster import kubectl, kuberay, local_job, ray_jobs, slurm_place
from cluster.job import JobSpec
from cluster.job_state import JobState
from cluster.profile import Profile


class _Scheduler(Protocol):
    """What a module of a scheduler has."""

    def submit(self, job: JobSpec) -> str: ...
    def state(self, profile: Profile, native_id: str) -> JobState: ...
    def logs(self, profile: Profile, native_id: str, *, follow: bool = False) -> Iterator[str]: ...
    def cancel(self, profile: Profile, native_id: str) -> None: ...


def render(job: JobSpec) -> str:
    """What would be sent, for people to read. Raises ValueError if it would not be taken."""
    match job.profile.kind:
        case "local":
            return local_job.render(job)
        case "ray":
            return ray_jobs.render(job)
        case "kuberay":
            return kuberay.render(job)
        case "slurm":
            return slurm_place.render(job)


def submit(job: JobSpec) -> str:
    """Send the job; returns the scheduler's id of it.

    Raises:
        AlreadyThereError: a job of that name is there.
        ValueError: the job cannot be put in the scheduler's words.
    """
    return _scheduler(job.profile).submit(job)


def state(profile: Profile, native_id: str) -> JobState:
    """Where a job stands."""
    return _scheduler(profile).state(profile, native_id)


def find(profile: Profile, name: str, host: str) -> str:
    """The scheduler's id of a job by its name; "" if it knows none of that name.

    Args:
        host: that the job was submitted from.
    """
    if profile.kind == "slurm":
        return slurm_place.find(name)
    native_id = f"{host}/{name}" if profile.kind == "local" else name
    return "" if state(profile, native_id).name == "unknown" else native_id


def logs(profile: Profile, native_id: str, *, follow: bool = False) -> Iterator[str]:
    """What the driver has said, in pieces; with `follow` until it ends."""
    return _scheduler(profile).logs(profile, native_id, follow=follow)


def cancel(profile: Profile, native_id: str) -> None:
    """Ask a job to save and end; does not wait for it."""
    _scheduler(profile).cancel(profile, native_id)


def _scheduler(profile: Profile) -> _Scheduler:
    match profile.kind:
        case "local":
            return local_job
        case "ray":
            return ray_jobs
        case "kuberay":
            return kubectl
        case "slurm":
            return slurm_place
