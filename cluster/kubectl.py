"""Sending a RayJob and asking after it, by kubectl: it knows the cluster and who one is."""

import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from typing import Any

from cluster import kuberay
from cluster.job import JobSpec
from cluster.job_state import AlreadyThereError, JobState, Patience, SchedulerError, Standing
from cluster.profile import Profile

TIMEOUT_S = 60.0
POLL_S = 3.0
STOP_WAIT_S = 180.0  # for the driver to save and leave before its cluster is taken down

_DEPLOYMENT: Mapping[str, Standing] = {
    "": "waiting",
    "Initializing": "waiting",
    "Waiting": "waiting",
    "Suspending": "waiting",
    "Suspended": "waiting",
    "Retrying": "waiting",
    "Running": "running",
    "Failed": "failed",
    "ValidationFailed": "failed",
}
_JOB: Mapping[str, Standing] = {
    "SUCCEEDED": "finished",
    "FAILED": "failed",
    "STOPPED": "cancelled",
}


def submit(job: JobSpec) -> str:
    """Create the RayJob; returns its name.

    Raises:
        AlreadyThereError: there is one of that name.
        SchedulerError: kubectl is missing, or the API server refuses.
    """
    _kubectl(job.profile, "create", "--filename=-", stdin=kuberay.render(job))
    return job.name


def state(profile: Profile, native_id: str) -> JobState:
    """Ask Kubernetes. Raises SchedulerError."""
    words = ("get", f"rayjob/{native_id}", "--ignore-not-found", "--output=json")
    text = _kubectl(profile, *words)
    if not text.strip():
        return JobState(name="unknown", reason="Kubernetes does not know it; was it deleted?")
    return read_state(json.loads(text))


def read_state(rayjob: Mapping[str, Any]) -> JobState:
    """Where a RayJob stands by its own status."""
    status = rayjob.get("status") or {}
    deployment = str(status.get("jobDeploymentStatus") or "")
    word = str(status.get("jobStatus") or "")
    name = _DEPLOYMENT.get(deployment, "unknown")
    if deployment == "Complete":
        name = _JOB.get(word, "unknown")
    reason = status.get("message") or status.get("reason") or ""
    if name == "waiting" and rayjob.get("spec", {}).get("suspend"):
        reason = reason or "in the queue"
    lines = str(reason).strip().splitlines()
    native = "/".join(part for part in (deployment, word) if part)
    return JobState(name=name, native=native, reason=lines[0] if lines else "")


def logs(profile: Profile, native_id: str, *, follow: bool = False) -> Iterator[str]:
    """What the driver has said; with `follow` until the job is over, from before it has begun.

    Raises:
        SchedulerError: it cannot be had; while following, only after several attempts.
    """
    patience = Patience(follow=follow)
    while True:
        try:
            if follow and state(profile, native_id).name == "waiting":
                patience.renew()
            else:
                yield from _words(profile, native_id, follow=follow)
                return
        except SchedulerError as error:
            patience.bear(error)
        time.sleep(POLL_S)


def _words(profile: Profile, native_id: str, *, follow: bool) -> Iterator[str]:
    """What the submitter's pod passes on, as long as the connection holds."""
    words = ["logs", f"job/{native_id}", *(["--follow"] if follow else [])]
    command = _command(profile, *words)
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    except FileNotFoundError as error:
        raise _absent(profile) from error
    with process:
        assert process.stdout is not None, "it is a pipe"
        assert process.stderr is not None, "it is a pipe"
        try:
            yield from process.stdout
            problem = process.stderr.read()
        finally:
            process.terminate()
    if process.returncode > 0:
        # between RayJob and driver: its pod is not there yet, or does not run yet
        is_early = any(one in problem for one in ("NotFound", "waiting to start", "timed out"))
        raise _refused(profile, " ".join(words), problem, may_pass=is_early)


def cancel(profile: Profile, native_id: str) -> None:
    """Let the driver save and leave, then take the job and its cluster down.

    Raises:
        SchedulerError: it is not there, or could not be deleted.
    """
    text = _kubectl(profile, "get", f"rayjob/{native_id}", "--ignore-not-found", "--output=json")
    if not text.strip():
        raise SchedulerError(f"no RayJob {native_id} in {_where(profile)}: nothing to cancel")
    status = json.loads(text).get("status") or {}
    cluster, submission = status.get("rayClusterName"), status.get("jobId")
    try:
        if cluster and submission and status.get("jobDeploymentStatus") == "Running":
            _stop_driver(profile, str(cluster), str(submission))
    finally:
        _kubectl(profile, "delete", f"rayjob/{native_id}", "--wait=false")


def _stop_driver(profile: Profile, cluster: str, submission: str) -> None:
    """SIGTERM to the driver through Ray on the head, which knows the token itself."""
    selector = f"ray.io/cluster={cluster},ray.io/node-type=head"
    pods = _kubectl(profile, "get", "pods", f"--selector={selector}", "--output=name").split()
    if pods:
        words = ("exec", pods[0], "--", "ray", "job", "stop", submission)
        _kubectl(profile, *words, timeout_s=STOP_WAIT_S)


def _kubectl(profile: Profile, *words: str, stdin: str = "", timeout_s: float = TIMEOUT_S) -> str:
    """Run kubectl; returns what it said. Raises SchedulerError."""
    try:
        done = subprocess.run(
            _command(profile, *words),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError as error:
        raise _absent(profile) from error
    except subprocess.TimeoutExpired as error:
        raise SchedulerError(
            f"kubectl {words[0]} took longer than {timeout_s:g} s for {_where(profile)}; can the "
            "API server be reached?",
            may_pass=True,
        ) from error
    if done.returncode != 0:
        raise _refused(profile, words[0], done.stderr)
    return done.stdout


def _command(profile: Profile, *words: str) -> list[str]:
    assert profile.kuberay is not None, "a profile of kind kuberay has its section"
    context = profile.kuberay.context
    place = [*([f"--context={context}"] if context else [])]
    return ["kubectl", *place, f"--namespace={profile.kuberay.namespace}", *words]


def _where(profile: Profile) -> str:
    assert profile.kuberay is not None, "a profile of kind kuberay has its section"
    return f"namespace {profile.kuberay.namespace} (profile {profile.name})"


def _absent(profile: Profile) -> SchedulerError:
    return SchedulerError(
        f"profile {profile.name} needs kubectl, which is not on PATH: install it and log in to the "
        "cluster, or run this command where both are"
    )


def _refused(profile: Profile, what: str, stderr: str, *, may_pass: bool = False) -> SchedulerError:
    lines = stderr.strip().splitlines()
    message = f"kubectl {what} in {_where(profile)}: {lines[-1] if lines else 'failed'}"
    if "AlreadyExists" in stderr:
        return AlreadyThereError(message)
    if 'no matches for kind "RayJob"' in stderr or "the server doesn't have a resource" in stderr:
        return SchedulerError(f"{message}; the KubeRay operator is not installed there")
    unreachable = any(
        words in stderr for words in ("Unable to connect", "was refused", "timeout", "timed out")
    )
    hint = "; is it up, and the context the right one?" if unreachable else ""
    return SchedulerError(message + hint, may_pass=may_pass or unreachable)
