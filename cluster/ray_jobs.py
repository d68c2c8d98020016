"""A job on a Ray cluster that is up: the request, purely, and Ray's Jobs API over HTTP.

The token comes from RAY_AUTH_TOKEN, or the file that RAY_AUTH_TOKEN_PATH names, and goes into one
header; it is in no message and no record. Values that a profile passes on are not sent: Ray writes
the variables of a job into its logs and tells them to whoever asks, so the nodes must hold them.
"""

import http.client
import json
import os
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from cluster.job import JobSpec
from cluster.job_state import AlreadyThereError, JobState, Patience, SchedulerError, Standing
from cluster.profile import Profile

Json = dict[str, Any]
TIMEOUT_S = 30.0
POLL_S = 2.0
# Ray kills a job 3 s after asking it to stop, unless told otherwise: training has to save.
STOP_WAIT_S = 120
DEFAULT_TOKEN_PATH = Path("~/.ray/auth_token")

_STATES: Mapping[str, Standing] = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "SUCCEEDED": "finished",
    "FAILED": "failed",
    "STOPPED": "cancelled",
}


def request(job: JobSpec) -> Json:
    """What is posted to /api/jobs/."""
    settings = job.profile.ray
    assert settings is not None, "a profile of kind ray has its section"
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **job.variables}
    return {
        "entrypoint": _entrypoint(job),
        "submission_id": job.name,
        "runtime_env": {"env_vars": variables},
        "metadata": {"ediffi_job": job.name, "profile": job.profile.name},
        "entrypoint_num_cpus": settings.num_cpus,
    }


def _entrypoint(job: JobSpec) -> str:
    """A line of shell; a webhook's address has another name there than the driver looks for."""
    renamed = [
        f'{name}="${{{source}}}"' for name, source in job.profile.passed.items() if name != source
    ]
    return " ".join([*renamed, shlex.join(job.command)])


def render(job: JobSpec) -> str:
    """The request as JSON, which is all that is sent but for the token."""
    assert job.profile.ray is not None, "a profile of kind ray has its section"
    body = json.dumps(request(job), indent=2)
    return f"POST {job.profile.ray.address}/api/jobs/\n{body}\n"


def submit(job: JobSpec) -> str:
    """Send the job; returns its id there.

    Raises:
        AlreadyThereError: the cluster has a job of that name.
        SchedulerError: it cannot be reached, or refuses.
    """
    answer = _call(job.profile, "POST", "/api/jobs/", request(job))
    if job.name not in (answer.get("submission_id"), answer.get("job_id")):
        raise _stranger(job.profile, "it took no job of that name")
    return job.name


def state(profile: Profile, native_id: str) -> JobState:
    """Ask the cluster. Raises SchedulerError."""
    try:
        found = _call(profile, "GET", f"/api/jobs/{quote(native_id)}")
    except _NoSuchJobError:
        return JobState(name="unknown", reason="the cluster does not know it; was it restarted?")
    if "status" not in found:
        raise _stranger(profile, "it tells no status of a job")
    word = str(found["status"])
    lines = str(found.get("message") or "").strip().splitlines()
    reason = lines[0] if lines else ""
    return JobState(name=_STATES.get(word, "unknown"), native=word, reason=reason)


def logs(profile: Profile, native_id: str, *, follow: bool = False) -> Iterator[str]:
    """What the driver has said, in pieces; with `follow` until the job is over.

    Raises:
        SchedulerError: it cannot be reached; while following, only after several attempts.
    """
    num_shown, patience = 0, Patience(follow=follow)
    while True:
        try:
            # asked first: what was said before the end is then in the text that is read after it
            is_over = state(profile, native_id).name not in ("waiting", "running")
            answer = _call(profile, "GET", f"/api/jobs/{quote(native_id)}/logs")
            text = str(answer.get("logs") or "")
            patience.renew()
        except _NoSuchJobError as error:
            raise SchedulerError(f"{error}; `ediffi status` tells what the store knows") from error
        except SchedulerError as error:
            patience.bear(error)
            is_over, text = False, ""
        if len(text) > num_shown:
            yield text[num_shown:]
            num_shown = len(text)
        if is_over or not follow:
            return
        time.sleep(POLL_S)


def cancel(profile: Profile, native_id: str) -> None:
    """Ask the job to save and end. Raises SchedulerError."""
    try:
        _call(profile, "POST", f"/api/jobs/{quote(native_id)}/stop")
    except _NoSuchJobError as error:
        raise SchedulerError(f"{error}; nothing is there to cancel") from error


class _NoSuchJobError(SchedulerError):
    """The cluster answers, but does not know the job."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A request that is sent elsewhere would take the token along, and a POST becomes a GET."""

    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        return None


def _call(profile: Profile, method: str, path: str, body: Json | None = None) -> Json:
    """One request. Raises SchedulerError with what to do."""
    assert profile.ray is not None, "a profile of kind ray has its section"
    address = profile.ray.address
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if token := _token():
        headers["Authorization"] = f"Bearer {token}"
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        call = urllib.request.Request(address + path, data=data, headers=headers, method=method)
        with opener.open(call, timeout=TIMEOUT_S) as answer:
            text = answer.read()
    except urllib.error.HTTPError as error:
        raise _refusal(profile, error, has_token=bool(token)) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise SchedulerError(
            f"no Ray dashboard at {address} (profile {profile.name}): {reason}; is the cluster up, "
            "and the address the dashboard's, whose port is mostly 8265?",
            may_pass=True,
        ) from error
    except ValueError as error:  # whose words may show the token
        raise SchedulerError(
            f"ray.address of profile {profile.name} must be http(s)://HOST:PORT, found {address}: "
            f"nothing can be asked there ({type(error).__name__})"
        ) from None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise _stranger(profile, str(error)) from error
    if not isinstance(found, dict):
        raise _stranger(profile, "it told no JSON object")
    return found


def _stranger(profile: Profile, problem: str) -> SchedulerError:
    """Whoever answers there is no dashboard."""
    assert profile.ray is not None, "a profile of kind ray has its section"
    return SchedulerError(
        f"{profile.ray.address} (profile {profile.name}) answers, but not as a Ray dashboard does: "
        f"{problem}; ray.address must be that of the dashboard itself"
    )


def _refusal(profile: Profile, error: urllib.error.HTTPError, *, has_token: bool) -> SchedulerError:
    """An HTTP error in words that help."""
    assert profile.ray is not None, "a profile of kind ray has its section"
    where = f"{profile.ray.address} (profile {profile.name})"
    # a 500 may hold a traceback, within a traceback whose line ends are escaped
    body = error.read().decode(errors="replace").replace("\\n", "\n")
    lines = [line.strip() for line in body.splitlines() if line.strip(" .")]
    if 300 <= error.code < 400:
        elsewhere = urlsplit(error.headers.get("Location") or "")
        return SchedulerError(
            f"{where} answered {error.code}, and sends us to "
            f"{elsewhere.scheme}://{elsewhere.hostname}: the token goes to no other place; if that "
            "is the dashboard, name it as ray.address in the profile"
        )
    if error.code == http.client.UNAUTHORIZED:
        what = "no token was sent" if not has_token else "the token was not taken"
        return SchedulerError(
            f"{where} asks for a token, and {what}: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to "
            "a file that holds it"
        )
    if error.code == http.client.FORBIDDEN:
        return SchedulerError(
            f"{where} refuses the token: RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH must hold the one "
            "that the cluster was started with"
        )
    if error.code == http.client.NOT_FOUND and lines and "does not exist" in lines[-1]:
        return _NoSuchJobError(f"{where}: {lines[-1]}")
    taken = next((line for line in lines if "already exists" in line), "")
    if taken:
        return AlreadyThereError(f"{where}: {taken}")
    words = lines[-1] if lines else "no words"
    return SchedulerError(f"{where} answered {error.code}: {words}", may_pass=error.code >= 500)


def _token() -> str:
    """The cluster's token as Ray's own clients find it; "" if there is none.

    Raises:
        SchedulerError: the file that was named cannot be read, or holds no token.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return _checked(token, "RAY_AUTH_TOKEN")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH", "").strip()
    path = Path(named or DEFAULT_TOKEN_PATH).expanduser()
    try:
        text = path.read_bytes().decode(errors="replace")
    except OSError as error:
        if named:
            raise SchedulerError(
                f"RAY_AUTH_TOKEN_PATH names {path}, which cannot be read: {error.strerror}"
            ) from error
        return ""
    return _checked(text.strip(), str(path))


def _checked(token: str, source: str) -> str:
    """The token if it can stand in a header; the message shows nothing of it."""
    if not (token.isascii() and token.isprintable()):
        raise SchedulerError(
            f"{source} must hold the cluster's token, one line of printable ASCII; found is "
            f"something else, with {len(token.splitlines())} lines: put the token alone there"
        )
    return token
