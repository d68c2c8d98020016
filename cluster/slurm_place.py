"""A profile's job in the words of `cluster.slurm`, and its log."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

from cluster import slurm
from cluster.job import JobSpec
from cluster.job_state import JobState, Patience, SchedulerError
from cluster.profile import Profile

POLL_S = 2.0
_DAY_MIN = 24 * 60  # of a job without a deadline: Slurm wants to know one


def slurm_job(job: JobSpec) -> slurm.SlurmJob:
    """Bring the two together. Raises ValueError for what cannot stand in a script."""
    profile, settings = job.profile, job.profile.slurm
    assert settings is not None, "a profile of kind slurm has its section"
    (group,) = profile.node_groups
    deadline_s, options = profile.deadline_s, dict(settings.options)
    if group.labels and "constraint" not in options:
        options["constraint"] = "&".join(sorted(group.labels))
    # a webhook's address has another name here than there; its value is in no script
    renamed = [
        f'export {name}="${source}"' for name, source in profile.passed.items() if name != source
    ]
    return slurm.SlurmJob(
        name=job.name,
        command=job.command,
        log_dir=_log_directory(profile),
        directory=settings.directory,
        num_nodes=group.num_nodes,
        cpus_per_node=group.cpus_per_node,
        memory_per_node_gib=group.memory_per_node_gib,
        gpus_per_node=group.accelerators_per_node,
        gpu_type=group.accelerator,
        node_group=group.name,
        partition=profile.queue,
        account=settings.account,
        qos=settings.quality_of_service,
        time_limit_min=_DAY_MIN if deadline_s == "none" else math.ceil(deadline_s / 60),
        save_s=settings.save_s,
        max_requeues=profile.max_restarts,
        node_loss_s=settings.node_loss_s,
        python=settings.python,
        scratch_dir=settings.scratch_directory,
        setup=(*renamed, *settings.setup),
        environment=job.variables,
        pass_environment=tuple(profile.passed.values()),
        options=options,
    )


def render(job: JobSpec) -> str:
    """The script for sbatch. Raises ValueError for what cannot stand in it."""
    return slurm.render(slurm_job(job))


def submit(job: JobSpec) -> str:
    """Queue the job; returns Slurm's number for it. Raises SchedulerError."""
    try:
        return slurm.submit(slurm_job(job))
    except slurm.SlurmError as error:
        raise SchedulerError(str(error)) from error


def state(profile: Profile, native_id: str) -> JobState:
    """Ask Slurm. Raises SchedulerError."""
    try:
        found = slurm.state(native_id)
    except slurm.SlurmError as error:
        raise SchedulerError(str(error), may_pass=True) from error
    return JobState(name=found.name, native=found.native, reason=found.reason)


def find(name: str) -> str:
    """Slurm's number for the job of that name; "" if it knows none. Raises SchedulerError."""
    try:
        return slurm.find(name)
    except slurm.SlurmError as error:
        raise SchedulerError(str(error), may_pass=True) from error


def logs(profile: Profile, native_id: str, *, follow: bool = False) -> Iterator[str]:
    """What script and driver have said, from the shared directory.

    Raises:
        SchedulerError: there is no log, or Slurm does not answer; while following, only after
            several attempts.
    """
    folder, patience = Path(_log_directory(profile)), Patience(follow=follow)
    while not (found := sorted(folder.glob(f"*-{native_id}.log"))):
        if not follow or _is_over(profile, native_id, patience):
            raise SchedulerError(
                f"no log of Slurm job {native_id} in {folder}: it has not begun, or this machine "
                "does not share that directory"
            )
        time.sleep(POLL_S)
    with found[0].open(errors="replace") as log:
        while True:
            # asked first: the last words are then read after the end
            is_over = not follow or _is_over(profile, native_id, patience)
            if text := log.read():
                yield text
            if is_over:
                return
            time.sleep(POLL_S)


def _is_over(profile: Profile, native_id: str, patience: Patience) -> bool:
    """Whether Slurm says so; a controller that does not answer is asked again."""
    try:
        found = state(profile, native_id)
    except SchedulerError as error:
        patience.bear(error)
        return False
    patience.renew()
    return found.name not in ("waiting", "running")


def cancel(profile: Profile, native_id: str) -> None:
    """Ask the job to save and end. Raises SchedulerError."""
    try:
        slurm.cancel(native_id)
    except slurm.SlurmError as error:
        raise SchedulerError(str(error)) from error


def _log_directory(profile: Profile) -> str:
    assert profile.slurm is not None, "a profile of kind slurm has its section"
    return profile.slurm.log_directory or f"{profile.slurm.directory}/ediffi-logs"
