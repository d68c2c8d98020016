"""Jobs on a real Ray head that asks for a token, and what is said where none answers."""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.request import Request, urlopen

import pytest

from cluster import ray_jobs
from cluster.job import JobSpec
from cluster.job_state import AlreadyThereError, JobState, SchedulerError
from cluster.profile import Profile
from tests.cluster.ray_head import LOOPBACK, TOKEN, Head, profile_at, running_head
from tests.infra.ports import free_port

# Set where `ray start` runs.
NODE_SECRETS = {"OUR_PASSWORD": "hidden-value-of-the-node", "OUR_CHAT": "https://chat.example/hook"}


def job_of(profile: Profile, name: str, folder: Path, code: str, **environment: str) -> JobSpec:
    """A job that runs some Python."""
    script = folder / "job.py"
    script.write_text(code)
    return JobSpec(
        name=name, command=(sys.executable, str(script)), profile=profile, environment=environment
    )


def await_state(profile: Profile, name: str, wanted: Callable[[JobState], bool]) -> JobState:
    """Ask until the job stands as wanted."""
    deadline = time.monotonic() + 120
    while not wanted(state := ray_jobs.state(profile, name)):
        assert time.monotonic() < deadline, state
        time.sleep(0.5)
    return state


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """`ray start --head` on loopback, with token authentication."""
    with running_head(tmp_path_factory.mktemp("ray"), **NODE_SECRETS) as head:
        yield head


@pytest.mark.slow
def test_a_job_is_sent_followed_and_ends(head: Head, tmp_path: Path) -> None:
    """Its words come while it runs, each once, and its end is known."""
    code = (
        "import os, time\n"
        "print('first', os.environ['COLOUR'], flush=True)\n"
        "time.sleep(6)\n"
        "print('last', flush=True)"
    )
    job = job_of(head.profile, "ediffi-follow-1", tmp_path, code, COLOUR="green")
    assert ray_jobs.submit(job) == job.name
    began, pieces = time.monotonic(), []
    for piece in ray_jobs.logs(head.profile, job.name, follow=True):
        pieces.append((time.monotonic() - began, piece))
    text = "".join(piece for _, piece in pieces)
    assert text.count("first green") == 1
    assert text.count("last") == 1
    first = next(when for when, piece in pieces if "first" in piece)
    last = next(when for when, piece in pieces if "last" in piece)
    assert last - first > 3
    assert ray_jobs.state(head.profile, job.name).name == "finished"
    with pytest.raises(AlreadyThereError):
        ray_jobs.submit(job)


@pytest.mark.slow
def test_a_cancelled_job_may_save_first(head: Head, tmp_path: Path) -> None:
    """It hears SIGTERM, and is given more time than Ray's own three seconds."""
    code = (
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(6)\n"
        f"    pathlib.Path({str(tmp_path / 'saved')!r}).touch()\n"
        "    sys.exit(3)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('ready', flush=True)\n"
        "time.sleep(100)"
    )
    job = job_of(head.profile, "ediffi-cancel-1", tmp_path, code)
    ray_jobs.submit(job)
    deadline = time.monotonic() + 60
    while "ready" not in "".join(ray_jobs.logs(head.profile, job.name)):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert ray_jobs.state(head.profile, job.name).name == "running"
    ray_jobs.cancel(head.profile, job.name)
    state = await_state(head.profile, job.name, lambda state: state.is_over)
    assert state.name == "cancelled"
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
def test_a_job_that_fails_says_why(head: Head, tmp_path: Path) -> None:
    """The state is failed, and the reason names the exit code."""
    job = job_of(head.profile, "ediffi-fail-1", tmp_path, "raise SystemExit(2)")
    ray_jobs.submit(job)
    state = await_state(head.profile, job.name, lambda state: state.is_over)
    assert state.name == "failed"
    assert "exit code 2" in state.reason


def answer_of(profile: Profile, path: str) -> str:
    """All that the head tells of its jobs, or of one."""
    assert profile.ray is not None
    call = Request(f"{profile.ray.address}/api/jobs/{path}")
    call.add_header("Authorization", f"Bearer {TOKEN}")
    with urlopen(call, timeout=30) as answer:
        return str(answer.read().decode())


@pytest.mark.slow
def test_what_is_passed_on_is_there_and_stands_nowhere(
    head: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The job finds the node's own values; nothing of ours, and no value at all, is told by Ray."""
    for name in NODE_SECRETS:
        monkeypatch.setenv(name, "hidden-value-of-here")
    assert head.profile.ray is not None
    profile = profile_at(
        head.profile.ray.address, pass_environment=["OUR_PASSWORD"], webhook="OUR_CHAT"
    )
    code = "import os; print(*(len(os.environ[n]) for n in ('OUR_PASSWORD', 'EDIFFI_WEBHOOK_URL')))"
    job = job_of(profile, "ediffi-pass-1", tmp_path, code)
    assert 'EDIFFI_WEBHOOK_URL=\\"${OUR_CHAT}\\"' in ray_jobs.render(job)
    ray_jobs.submit(job)
    text = "".join(ray_jobs.logs(profile, job.name, follow=True))
    lengths = [str(len(value)) for value in NODE_SECRETS.values()]
    assert text.split()[-2:] == lengths
    told = [text, ray_jobs.render(job), *(answer_of(profile, path) for path in ("", job.name))]
    logs = [path for path in head.logs.rglob("logs/**/*") if path.is_file()]
    assert any("runtime_env_agent" in path.name for path in logs)
    told += [path.read_text(errors="replace") for path in logs]
    assert any(job.name in one for one in told[4:])
    for value in (*NODE_SECRETS.values(), "hidden-value-of-here", TOKEN):
        assert not [one for one in told if value in one]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("a-wrong-token-which-must-not-be-shown", "refuses the token"),
        ("", "asks for a token, and no token was sent: set RAY_AUTH_TOKEN"),
    ],
)
def test_a_wrong_token_is_told_without_showing_it(
    head: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token: str, words: str
) -> None:
    """The message says which variables to set, and holds no token."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    monkeypatch.setattr(ray_jobs, "DEFAULT_TOKEN_PATH", tmp_path / "none")
    with pytest.raises(SchedulerError, match=words) as caught:
        ray_jobs.state(head.profile, "ediffi-follow-1")
    assert not caught.value.may_pass
    assert not token or token not in str(caught.value)


@pytest.mark.slow
def test_a_token_may_come_from_a_file(
    head: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """RAY_AUTH_TOKEN_PATH names it; a file that is not there is told."""
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / "token").write_text(TOKEN + "\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert ray_jobs.state(head.profile, "nobody").name == "unknown"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    with pytest.raises(SchedulerError, match=r"RAY_AUTH_TOKEN_PATH names .*absent"):
        ray_jobs.state(head.profile, "nobody")


@pytest.mark.slow
def test_a_job_nobody_knows(head: Head) -> None:
    """Its state is unknown; there is nothing to read or to cancel."""
    assert ray_jobs.state(head.profile, "ediffi-nobody-1").name == "unknown"
    with pytest.raises(SchedulerError, match="does not exist"):
        list(ray_jobs.logs(head.profile, "ediffi-nobody-1"))
    with pytest.raises(SchedulerError, match="nothing is there to cancel"):
        ray_jobs.cancel(head.profile, "ediffi-nobody-1")


def test_a_cluster_that_is_not_there_is_told() -> None:
    """The message names the address, and that the same command may do later."""
    profile = profile_at(f"http://{LOOPBACK}:{free_port()}")
    with pytest.raises(
        SchedulerError, match=r"no Ray dashboard at .*\(profile test\).*refused"
    ) as caught:
        ray_jobs.state(profile, "ediffi-x-1")
    assert caught.value.may_pass


@pytest.mark.parametrize(
    ("from_file", "text"),
    [*itertools.product([False, True], ["hidden-1\nhidden-2", "hidden\tä"]), (True, "hidden\x00")],
)
def test_a_token_that_cannot_be_sent_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, from_file: bool
) -> None:
    """The message names the variable or the file, and what a token is."""
    (tmp_path / "token").write_text(text)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    if not from_file:
        monkeypatch.setenv("RAY_AUTH_TOKEN", text)
    source = str(tmp_path / "token") if from_file else "RAY_AUTH_TOKEN"
    with pytest.raises(SchedulerError, match=f"{source} must hold .* one line") as caught:
        ray_jobs.state(profile_at(f"http://{LOOPBACK}:{free_port()}"), "ediffi-x-1")
    assert "hidden" not in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            (302, "http://{elsewhere}/stolen?key=hidden", ""),
            "answered 302, and sends us to http://",
        ),
        ((200, "", "[]"), "not as a Ray dashboard does: it told no JSON object"),
        ((200, "", "{}"), "not as a Ray dashboard does: it t"),
        ((200, "", "<html>"), "not as a Ray dashboard does: Expecting value"),
    ],
)
def test_a_stranger_is_not_taken_for_a_dashboard(
    monkeypatch: pytest.MonkeyPatch, answer: tuple[int, str, str], words: str
) -> None:
    """Nothing counts as sent, and the token goes to no other place."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token")
    with answering((200, "", "[]")) as (elsewhere, stolen):
        status, place, body = answer
        with answering((status, place.format(elsewhere=elsewhere), body)) as (address, _):
            profile = profile_at(f"http://{address}")
            job = JobSpec(name="ediffi-x-1", command=("ediffi", "run"), profile=profile)
            for ask in (
                lambda: ray_jobs.submit(job),
                lambda: ray_jobs.state(profile, "ediffi-x-1"),
            ):
                with pytest.raises(SchedulerError, match=words) as caught:
                    ask()
                assert "hidden" not in str(caught.value)
    assert stolen == []


@contextmanager
def answering(answer: tuple[int, str, str]) -> Iterator[tuple[str, list[str]]]:
    """A server that says the same to all: status, location, body; yields address and requests."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            status, place, body = answer
            self.send_response(status)
            if place:
                self.send_header("Location", place)
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Nobody wants to read it."""

    server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"{LOOPBACK}:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_request_is_a_function_of_the_job() -> None:
    """What is printed is what is sent."""
    profile = profile_at("http://10.0.0.5:8265/", environment={"B": "2"})
    job = JobSpec(
        name="ediffi-x-1", command=("ediffi", "run", "a b"), profile=profile, environment={"A": "1"}
    )
    first, _, body = ray_jobs.render(job).partition("\n")
    assert first == "POST http://10.0.0.5:8265/api/jobs/"
    assert json.loads(body) == ray_jobs.request(job)
    assert json.loads(body)["entrypoint"] == "ediffi run 'a b'"
    assert json.loads(body)["runtime_env"]["env_vars"] == {
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
        "A": "1",
        "B": "2",
    }
