"""What schedulers say of jobs in the store, with their errors in ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pipelines.errors import RetryableError, UserError
from pipelines.jobs.submitted import Job, Jobs

if TYPE_CHECKING:
    from cluster.profile import Profile

SENDING_S = 180.0  # longer than any scheduler is waited for


def is_open(job: Job) -> bool:
    """Whether a job waits or runs, as last heard."""
    return job.state in ("waiting", "running")


def is_over(job: Job) -> bool:
    """Whether a job has ended, as last heard."""
    from cluster.job_state import ENDED

    return job.state in ENDED


def place_of(job: Job) -> str:
    """Whom to ask for a job: the same for all jobs that one scheduler answers for."""
    settings = job.profile.get(job.kind) or {}
    return f"{job.kind} {settings.get('address') or settings.get('context') or ''}"


def heard(jobs: Jobs, job: Job) -> Job:
    """The job as its scheduler sees it now; once it has ended nobody is asked again.

    Raises:
        UserError, RetryableError: the scheduler cannot be asked.
    """
    from cluster import launch

    if is_over(job):
        return job
    if not (sought := _sought(job)).native_id:
        return sought
    with scheduler_errors():
        found = launch.state(profile_of(job), sought.native_id)
    told = replace(sought, state=found.name, reason=found.reason)
    if told != job:
        with suppress(OSError):  # a store mounted for reading: it is asked again next time
            jobs.write(told)
    return told


def _sought(job: Job) -> Job:
    """The job with its scheduler's id, which is asked for by the job's name if nobody noted it.

    Nobody has while the job is being sent, or when the command that sent it was killed.
    """
    from cluster import launch

    if job.native_id:
        return job
    with scheduler_errors():
        native_id = launch.find(profile_of(job), job.job_id, job.host)
    if native_id:
        return replace(job, native_id=native_id)
    age_s = (datetime.now(UTC) - datetime.fromisoformat(job.submitted)).total_seconds()
    if age_s < SENDING_S:
        return replace(job, state="waiting", reason="it is being submitted")
    reason = "its submission was interrupted, and the scheduler knows no job of that name"
    return replace(job, state="unknown", reason=reason)


def words_of(job: Job, *, follow: bool) -> Iterator[str]:
    """What the driver of a job has said. Raises UserError, RetryableError."""
    from cluster import launch

    with scheduler_errors():
        yield from launch.logs(profile_of(job), _native_id(job), follow=follow)


def cancel(jobs: Jobs, job: Job) -> None:
    """Ask a job to save and end. Raises UserError, RetryableError."""
    from cluster import launch

    with scheduler_errors():
        launch.cancel(profile_of(job), native_id := _native_id(job))
    if job.kind == "kuberay":  # which forgets what was deleted
        reason = "it was cancelled, and its RayJob deleted"
        jobs.write(replace(job, native_id=native_id, state="cancelled", reason=reason))


def profile_of(job: Job) -> Profile:
    """The place as it was when the job was submitted."""
    from cluster.profile import Profile

    try:
        return Profile.from_mapping(job.profile_name, job.profile)
    except ValueError as error:
        raise UserError(
            f"job {job.job_id} was submitted by another version, whose profile this one does not "
            f"read: {error}"
        ) from error


@contextmanager
def scheduler_errors() -> Iterator[None]:
    """A scheduler that cannot be asked is worth another try; one that refuses is not."""
    from cluster.job_state import AlreadyThereError, SchedulerError

    try:
        yield
    except AlreadyThereError:
        raise
    except SchedulerError as error:
        kind = RetryableError if error.may_pass else UserError
        raise kind(str(error)) from error


def _native_id(job: Job) -> str:
    if native_id := (sought := _sought(job)).native_id:
        return native_id
    raise UserError(f"job {job.job_id}: {sought.reason}; ask again, or look for it there")
