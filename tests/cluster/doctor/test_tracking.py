"""Tests of cluster.doctor.tracking: databases and servers that are there, and some that are not."""

import base64
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cluster.doctor.finding import Finding
from cluster.doctor.tracking import check_tracking


@dataclass
class Server:
    """Answers as an MLflow server does; `login` is what it asks for beyond /health."""

    url: str = ""
    login: str = ""
    skew_s: float = 0.0


@pytest.fixture
def server() -> Iterator[Server]:
    """One that lets everybody in, until the test says otherwise."""
    one = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            expected = f"Basic {base64.b64encode(one.login.encode()).decode()}"
            if self.path == "/health":
                status = 200
            elif not self.path.startswith("/api/2.0/mlflow/experiments/search"):
                status = 404
            else:
                status = 200 if self.headers["Authorization"] == expected or not one.login else 401
            self.send_response(status)
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate(time.time() + one.skew_s, usegmt=True)

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    one.url = f"http://127.0.0.1:{http.server_port}"
    yield one
    http.shutdown()
    thread.join()
    http.server_close()


def check(uri: str) -> Finding:
    """The finding on the tracking itself."""
    return check_tracking(uri, timeout_s=1.0)[0]


def test_tracking_database(tmp_path: Path) -> None:
    """A new database and an existing one are fine; neither is created or changed."""
    path = tmp_path / "mlflow.db"
    assert check(f"sqlite:///{path}").ok
    assert not path.exists()
    sqlite3.connect(path).execute("CREATE TABLE t (x)").connection.close()
    before = path.read_bytes()
    assert check(f"sqlite:///{path}").ok
    assert path.read_bytes() == before


def test_tracking_file_that_is_no_database(tmp_path: Path) -> None:
    """Any other file under the database's name is refused."""
    path = tmp_path / "mlflow.db"
    path.write_text("not a database, but longer than the sixteen bytes of a header" * 10)
    assert not check(f"sqlite:///{path}").ok


def test_tracking_server(server: Server) -> None:
    """A server that answers /health is fine; one that does not, or is not there, is not."""
    assert [one.ok for one in check_tracking(server.url)] == [True, True]
    assert not check(f"{server.url}/elsewhere").ok
    assert not check("http://127.0.0.1:1").ok


def test_a_server_that_asks_who_we_are(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """/health alone says nothing of a password: strangers are told which variables to set."""
    server.login = "me:hunter2"
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    finding = check(server.url)
    assert not finding.ok
    assert "MLFLOW_TRACKING_USERNAME" in finding.remedy
    assert check(server.url.replace("//", "//me:hunter2@")).ok
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    assert check(server.url).ok


@pytest.mark.parametrize(("skew_s", "ok"), [(0.0, True), (-30.0, False), (30.0, False)])
def test_the_servers_clock_is_compared(server: Server, skew_s: float, ok: bool) -> None:
    """By the date of its answer; half a minute off is told with its direction."""
    server.skew_s = skew_s
    _, clock = check_tracking(server.url)
    assert (clock.name, clock.ok) == ("tracking's clock", ok)
    if not ok:
        assert ("ahead of" if skew_s > 0 else "behind") in clock.found


def test_a_database_server_that_listens() -> None:
    """Its port is tried; a closed one is told with the host and without the password."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        assert check(f"postgresql+psycopg2://me:hunter2@127.0.0.1:{port}/mlflow").ok
    finding = check(f"postgresql+psycopg2://me:hunter2@127.0.0.1:{port}/mlflow")
    assert not finding.ok
    assert "start the postgresql server" in finding.remedy


def test_tracking_never_shows_a_password() -> None:
    """Credentials in a URI stay out of the finding, reachable or not."""
    uris = [
        "http://user:hunter2@127.0.0.1:1",
        "postgresql://user:hunter2@127.0.0.1/mlflow",
        "postgresql+psycopg2://user:hunter2@127.0.0.1/mlflow",
        "ftp://user:hunter2@127.0.0.1/",
    ]
    for uri in uris:
        assert "hunter2" not in repr(check(uri))


def test_tracking_folder_is_refused() -> None:
    """MLflow's plain folders are gone: the finding says what to use instead."""
    assert "sqlite:///" in check("/tmp/mlruns").remedy
