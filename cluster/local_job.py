"""A job on this machine: a process of its own that outlives the command that started it.

$EDIFFI_CACHE/jobs/<name>/ (~/.cache/ediffi) holds its log, its exit code once it is over, a mark
if it was cancelled, and a file that it keeps locked as long as it lives: a process number alone may
be somebody else's by now.
"""

import fcntl
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from cluster.job import JobSpec
from cluster.job_state import AlreadyThereError, JobState, SchedulerError, values_of
from cluster.profile import Profile

POLL_S = 0.5
_STOPPED = (3, 130, 143)  # exit codes of a driver that was told to end

# The shell hears SIGTERM too, but stays until the driver has left, to note its exit code. SIGUSR1
# it passes on as SIGTERM to the driver alone: Ray's processes are in the same group, and must live
# until the driver has saved. A `wait` that a signal interrupts is repeated; it tells 127 of a
# driver that has been waited for already.
_SCRIPT = """
driver= told= code=
trap 'again=1' TERM INT
trap 'again=1; told=1; [ -z "$driver" ] || kill -TERM "$driver" 2>/dev/null' USR1
"$@" &
driver=$!
[ -z "$told" ] || kill -TERM "$driver"
while :; do
  again=
  wait "$driver"
  found=$?
  [ -n "$code" ] && [ "$found" = 127 ] || code=$found
  [ -n "$again" ] || break
done
echo "$code" >"$EDIFFI_JOB_EXIT"
"""


def render(job: JobSpec) -> str:
    """The command as a line of shell; instead of what is passed on, nothing: it is inherited."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in job.variables.items()]
    return " ".join([*variables, shlex.join(job.command)]) + "\n"


def submit(job: JobSpec) -> str:
    """Start the job; returns `host/name`.

    Raises:
        AlreadyThereError: it runs already.
        SchedulerError: its program is not there.
    """
    folder = _folder(job.name)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AlreadyThereError(f"job {job.name} runs on this machine already") from error
        for name in ("exit", "cancelled"):
            (folder / name).unlink(missing_ok=True)
        variables = {**os.environ, **values_of(job.profile), **job.variables}
        variables["EDIFFI_JOB_EXIT"] = str(folder / "exit")
        with (folder / "log.txt").open("ab") as log:
            process = _start(job.command, variables, log.fileno(), lock.fileno())
        (folder / "pid").write_text(str(process.pid))
        # the lock stays with the process that inherited it
    return f"{socket.gethostname()}/{job.name}"


def _start(
    command: tuple[str, ...], variables: Mapping[str, str], log: int, lock: int
) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        ["/bin/sh", "-c", _SCRIPT, "ediffi-job", *command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=dict(variables),
        pass_fds=(lock,),
        start_new_session=True,
    )


def state(profile: Profile, native_id: str) -> JobState:
    """Look at the job's folder. Raises SchedulerError on another machine."""
    folder = _folder_of(native_id)
    if _is_alive(folder):
        return JobState(name="running", native=f"process {_read(folder / 'pid')}")
    code = _read(folder / "exit")
    if not code:
        known = (folder / "pid").exists()
        reason = "it was killed, or the machine restarted" if known else "nothing is known of it"
        return JobState(name="failed" if known else "unknown", reason=reason)
    word = f"exit code {code}"
    if int(code) in _STOPPED and (folder / "cancelled").exists():
        return JobState(name="cancelled", native=word, reason="it was told to end")
    reason = "it may be submitted again, and goes on" if int(code) in _STOPPED else ""
    return JobState(name="finished" if code == "0" else "failed", native=word, reason=reason)


def logs(profile: Profile, native_id: str, *, follow: bool = False) -> Iterator[str]:
    """What the driver has said; with `follow` until the job is over. Raises SchedulerError."""
    folder = _folder_of(native_id)
    if not (folder / "log.txt").exists():
        raise SchedulerError(f"no log of job {native_id} in {folder}")
    with (folder / "log.txt").open(errors="replace") as log:
        while True:
            is_alive = _is_alive(folder)  # asked first: the last words are then read after the end
            if text := log.read():
                yield text
            if not (follow and is_alive):
                return
            time.sleep(POLL_S)


def cancel(profile: Profile, native_id: str) -> None:
    """Ask the job to save and end. Raises SchedulerError."""
    folder = _folder_of(native_id)
    if not _is_alive(folder):
        raise SchedulerError(f"job {native_id} does not run: nothing to cancel")
    (folder / "cancelled").touch()
    process = int(_read(folder / "pid"))
    try:
        os.kill(process, signal.SIGUSR1)
    except ProcessLookupError as error:
        raise SchedulerError(
            f"job {native_id}: its process {process} was killed, but something that it started "
            f"lives on and holds {folder / 'lock'}: end that by hand (`fuser` names it)"
        ) from error


def _folder(name: str) -> Path:
    cache = os.environ.get("EDIFFI_CACHE") or Path.home() / ".cache" / "ediffi"
    return Path(cache).expanduser().absolute() / "jobs" / name


def _folder_of(native_id: str) -> Path:
    host, _, name = native_id.rpartition("/")
    if host != socket.gethostname():
        raise SchedulerError(
            f"job {name} was started on {host}, this is {socket.gethostname()}: ask there"
        )
    return _folder(name)


def _is_alive(folder: Path) -> bool:
    try:
        with (folder / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""
