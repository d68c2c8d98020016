"""Tests of pipelines.webhook: what a real server on loopback is told, also one that fails."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pipelines import webhook


@dataclass
class Listener:
    """A webhook: what it was sent, and what it answers, the last answer for ever."""

    answers: list[int] = field(default_factory=lambda: [200])
    bodies: list[Any] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    delay_s: float = 0.0
    url: str = ""


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """Listening, and named by the environment."""
    one = Listener()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.headers["Content-Type"] == "application/json"
            one.bodies.append(json.loads(body))
            one.paths.append(self.path)
            time.sleep(one.delay_s)
            status = one.answers.pop(0) if len(one.answers) > 1 else one.answers[0]
            self.send_response(status)
            if status == 302:
                self.send_header("Location", f"{one.url}/elsewhere")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    one.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("EDIFFI_WEBHOOK_URL", f"{one.url}/services/T0/very-secret-part")
    monkeypatch.setattr(webhook, "FIRST_PAUSE_S", 0.02)
    yield one
    server.shutdown()
    thread.join()
    server.server_close()


def record(**values: Any) -> dict[str, Any]:
    """A run's record as it stands in the store."""
    row = {"name": "ingest", "fingerprint": "f", "state": "ran", "seconds": 61.5, "units": 3}
    return {
        "run_id": "demo-1",
        "recipe": "demo",
        "resolved": {"data": {"list": "/data/list"}},
        "state": "finished",
        "started": "2026-11-23T12:00:00+00:00",
        "ended": "2026-11-23T12:01:05+00:00",
        "seconds": 65.25,
        "host": "here",
        "stages": [{**row, "path": "/store/ingest/f"}],
        "error": "",
        **values,
    }


def tell(deadline_s: float = 5.0, **values: Any) -> tuple[bool, list[str]]:
    """Whether the webhook took it, and what people were told."""
    said: list[str] = []
    return webhook.tell(record(**values), said.append, deadline_s=deadline_s), said


def test_a_finished_run_is_told(listener: Listener) -> None:
    """One POST: a line for people, fields for programs."""
    assert tell() == (True, [])
    (body,) = listener.bodies
    assert listener.paths == ["/services/T0/very-secret-part"]
    assert body["text"] == "ediffi run demo-1 finished after 1 min 5 s"
    assert (body["run_id"], body["recipe"], body["state"]) == ("demo-1", "demo", "finished")
    assert (body["seconds"], body["first_failure"]) == (65.25, "")
    assert body["stages"] == [{"name": "ingest", "state": "ran", "seconds": 61.5, "units": 3}]


def test_a_failed_run_tells_what_failed_first(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unit's own line; the rest of the report stands in the text. No secret does."""
    monkeypatch.setenv("HF_TOKEN", "hf-very-secret")
    error = "stage embed/t5: 2 of 9 units failed\n  train-3: no hf-very-secret\n  train-7: odd"
    assert tell(state="failed", error=error) == (True, [])
    (body,) = listener.bodies
    assert body["first_failure"] == "train-3: no ***"
    assert "train-7: odd" in body["text"]
    assert "hf-very-secret" not in json.dumps(body)


def test_a_stopped_run_is_told_as_stopped(listener: Listener) -> None:
    """With the word how to go on, and without calling it a failure."""
    tell(state="stopped", error="told to end (SIGTERM); run the same command to go on")
    (body,) = listener.bodies
    assert (body["state"], body["first_failure"]) == ("stopped", "")
    assert "run the same command" in body["text"]


def test_no_webhook_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variable nothing happens, and nothing is said."""
    monkeypatch.delenv("EDIFFI_WEBHOOK_URL", raising=False)
    assert tell() == (False, [])


def test_a_server_that_fails_in_passing_is_asked_again(listener: Listener) -> None:
    """Errors of the server and too many requests pass; the third time it is taken."""
    listener.answers = [503, 429, 200]
    assert tell() == (True, [])
    assert len(listener.bodies) == 3


@pytest.mark.parametrize("status", [400, 403, 404, 302])
def test_a_refusal_is_final_and_said(listener: Listener, status: int) -> None:
    """Asked once; what is said names the host and never the address. Nothing follows elsewhere."""
    listener.answers = [status]
    taken, said = tell()
    assert not taken
    assert len(listener.bodies) == 1
    (words,) = said
    assert words == (
        f"the webhook was not told: 127.0.0.1 answered {status}: check EDIFFI_WEBHOOK_URL"
    )


def test_a_server_that_stays_broken_is_given_up(listener: Listener) -> None:
    """After the deadline, and the run goes on."""
    listener.answers = [500]
    start = time.monotonic()
    taken, said = tell(deadline_s=0.3)
    assert not taken
    assert time.monotonic() - start < 5
    assert len(listener.bodies) >= 2
    assert "answered 500, until 0.3 s were over" in said[0]
    assert "very-secret-part" not in said[0]


def test_a_server_that_never_answers_is_given_up(listener: Listener) -> None:
    """Its silence counts against the same deadline."""
    listener.delay_s = 3.0
    start = time.monotonic()
    taken, said = tell(deadline_s=0.4)
    assert not taken
    assert time.monotonic() - start < 2.5
    assert "could not be reached" in said[0]


@pytest.mark.parametrize(
    "url", ["hooks.example.org/abcdef", "file:///etc/passwd", "http://", "https://[oops/abcdef"]
)
def test_what_is_no_address_is_said_without_it(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """A wrong variable is told by its name; its value may be a secret all the same."""
    monkeypatch.setenv("EDIFFI_WEBHOOK_URL", url)
    taken, said = tell()
    assert not taken
    assert "EDIFFI_WEBHOOK_URL" in said[0]
    assert "abcdef" not in said[0]


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port without a server is tried until the deadline, and then said."""
    monkeypatch.setenv("EDIFFI_WEBHOOK_URL", "http://127.0.0.1:9/secret-part")
    taken, said = tell(deadline_s=0.2)
    assert not taken
    assert said == [
        "the webhook was not told: 127.0.0.1 could not be reached (ConnectionRefusedError), "
        "until 0.2 s were over"
    ]
