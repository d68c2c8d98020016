"""Jobs on this machine: real processes that outlive whoever started them."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import launch, local_job
from cluster.job import JobSpec
from cluster.job_state import AlreadyThereError, SchedulerError
from cluster.profile import Profile

LOCAL = Profile(name="laptop", kind="local")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are kept in a folder of the test's own."""
    monkeypatch.setenv("EDIFFI_CACHE", str(tmp_path / "cache"))


def job_of(code: str, *, name: str = "ediffi-x-1", **environment: str) -> JobSpec:
    """A job that runs some Python."""
    words = (sys.executable, "-c", f"exec({code!r})")  # a word of a command is one line
    return JobSpec(name=name, command=words, profile=LOCAL, environment=environment)


def await_word(native_id: str, word: str, deadline_s: float = 30) -> None:
    """Wait until the job has said it."""
    deadline = time.monotonic() + deadline_s
    while word not in (said := "".join(local_job.logs(LOCAL, native_id))):
        assert local_job.state(LOCAL, native_id).name == "running", said
        assert time.monotonic() < deadline, said
        time.sleep(0.05)


def test_a_job_is_followed_to_its_end() -> None:
    """All it says comes, and its exit code is known afterwards."""
    code = "import os, time; print(os.environ['A'], flush=True); time.sleep(1); print('last')"
    native_id = local_job.submit(job_of(code, A="first"))
    assert local_job.state(LOCAL, native_id).name == "running"
    text = "".join(local_job.logs(LOCAL, native_id, follow=True))
    assert text.split() == ["first", "last"]
    assert local_job.state(LOCAL, native_id).name == "finished"


def test_a_job_runs_on_without_its_submitter(tmp_path: Path) -> None:
    """The process that submitted ends; the job does not, and another process finds it."""
    code = (
        "from tests.cluster.test_local_job import job_of, local_job\n"
        "print(local_job.submit(job_of('import time; time.sleep(2); print(7)')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    native_id = done.stdout.strip()
    assert local_job.state(LOCAL, native_id).name == "running"
    assert "".join(local_job.logs(LOCAL, native_id, follow=True)) == "7\n"


def test_a_cancelled_job_may_save() -> None:
    """SIGTERM reaches the driver, and its exit code 3 then means that it was told to end."""
    code = (
        "import signal, sys, time; "
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(3))); "
        "print('ready', flush=True); time.sleep(60)"
    )
    native_id = local_job.submit(job_of(code))
    await_word(native_id, "ready")
    local_job.cancel(LOCAL, native_id)
    assert "saved" in "".join(local_job.logs(LOCAL, native_id, follow=True))
    assert local_job.state(LOCAL, native_id).name == "cancelled"
    with pytest.raises(SchedulerError, match="does not run"):
        local_job.cancel(LOCAL, native_id)


def test_what_the_driver_started_is_left_to_it() -> None:
    """Only the driver hears of a cancelled job's end: it needs its children until it has saved."""
    code = (
        "import signal, subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "def save(*_):\n"
        "    time.sleep(1)\n"
        "    print('child', 'lives' if child.poll() is None else 'is gone', flush=True)\n"
        "    child.kill()\n"
        "    sys.exit(3)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    native_id = local_job.submit(job_of(code))
    await_word(native_id, "ready")
    local_job.cancel(LOCAL, native_id)
    assert "child lives" in "".join(local_job.logs(LOCAL, native_id, follow=True))
    assert local_job.state(LOCAL, native_id).native == "exit code 3"


@pytest.mark.slow
def test_ray_lives_until_a_cancelled_driver_has_saved() -> None:
    """A driver that hears SIGTERM can still give Ray a task."""
    code = (
        "import signal, sys, threading, ray\n"
        "from pipelines.driver.ray_cluster import connect, disconnect\n"
        "connect()\n"
        "told = threading.Event()\n"
        "signal.signal(signal.SIGTERM, lambda *_: told.set())\n"
        "print('ready', flush=True)\n"
        "while not told.wait(0.1): pass\n"
        "print('saved', ray.get(ray.remote(lambda: 6 * 7).remote(), timeout=60), flush=True)\n"
        "disconnect()\n"
        "sys.exit(3)"
    )
    root = str(Path(__file__).parents[2])
    native_id = local_job.submit(job_of(code, RAY_ADDRESS="", PYTHONPATH=root))
    await_word(native_id, "ready", deadline_s=120)
    local_job.cancel(LOCAL, native_id)
    assert "saved 42" in "".join(local_job.logs(LOCAL, native_id, follow=True))
    assert local_job.state(LOCAL, native_id).name == "cancelled"


@pytest.mark.parametrize(
    ("code", "name", "reason"),
    [(3, "failed", "may be submitted again"), (2, "failed", ""), (0, "finished", "")],
)
def test_an_exit_code_alone_is_no_cancellation(code: int, name: str, reason: str) -> None:
    """3 is whatever may pass: only a job that somebody cancelled is called so."""
    native_id = local_job.submit(job_of(f"raise SystemExit({code})"))
    "".join(local_job.logs(LOCAL, native_id, follow=True))
    state = local_job.state(LOCAL, native_id)
    assert (state.name, state.native) == (name, f"exit code {code}")
    assert reason in state.reason


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_code_of_a_driver_that_a_signal_ended_is_noted(number: signal.Signals) -> None:
    """As a shell tells it; the job is over then."""
    code = "import os; os.kill(os.getpid(), " + str(int(number)) + ")"
    native_id = local_job.submit(job_of(code))
    "".join(local_job.logs(LOCAL, native_id, follow=True))
    state = local_job.state(LOCAL, native_id)
    assert (state.name, state.native) == ("failed", f"exit code {128 + number}")


def test_a_job_is_found_by_its_name() -> None:
    """Whoever has not got the answer of a submission can ask whether it arrived."""
    assert launch.find(LOCAL, "ediffi-x-1", socket.gethostname()) == ""
    native_id = local_job.submit(job_of("pass"))
    assert launch.find(LOCAL, "ediffi-x-1", socket.gethostname()) == native_id
    with pytest.raises(SchedulerError, match="started on elsewhere"):
        launch.find(LOCAL, "ediffi-x-1", "elsewhere")


def test_a_running_job_is_not_started_twice() -> None:
    """The second submission is refused as long as the first runs, and taken afterwards."""
    native_id = local_job.submit(job_of("import time; time.sleep(1)"))
    with pytest.raises(AlreadyThereError):
        local_job.submit(job_of("pass"))
    "".join(local_job.logs(LOCAL, native_id, follow=True))
    local_job.submit(job_of("pass"))


def test_a_job_that_fails_or_was_killed_is_told() -> None:
    """By its exit code; without one it was killed."""
    native_id = local_job.submit(job_of("raise SystemExit(2)"))
    "".join(local_job.logs(LOCAL, native_id, follow=True))
    state = local_job.state(LOCAL, native_id)
    assert (state.name, state.native) == ("failed", "exit code 2")
    native_id = local_job.submit(
        job_of("print('ready', flush=True); import time; time.sleep(60)", name="ediffi-y-1")
    )
    await_word(native_id, "ready")
    folder = Path(os.environ["EDIFFI_CACHE"]) / "jobs" / "ediffi-y-1"
    os.killpg(int((folder / "pid").read_text()), signal.SIGKILL)
    "".join(local_job.logs(LOCAL, native_id, follow=True))
    state = local_job.state(LOCAL, native_id)
    assert state.name == "failed"
    assert "was killed" in state.reason


def test_a_job_of_another_machine_is_asked_for_there() -> None:
    """The error names both machines."""
    with pytest.raises(
        SchedulerError, match=f"started on elsewhere, this is {socket.gethostname()}"
    ):
        local_job.state(LOCAL, "elsewhere/ediffi-x-1")
