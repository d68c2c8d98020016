"""Tests of fetching and its process: the real img2dataset over local web servers."""

import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import RetryableError
from pipelines.stages.ingestion import fetch as fetching
from pipelines.stages.ingestion.fetch import (
    PASSING_REASONS,
    Download,
    FetchSettings,
    check_outage,
    classify,
    fetch,
    resolve_address,
)
from pipelines.stages.ingestion.rejects import Rejection
from pipelines.stages.ingestion.source_list import Row

KIB = 1024
Answer = Callable[[BaseHTTPRequestHandler, int], None]  # the int: how often this was asked before


@dataclass
class Server:
    """A web server that answers each path as it was told to, and counts who asked."""

    answers: dict[str, Answer] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        self.asked.append(path)
        self.answers[path](request, self.asked.count(path) - 1)


def serve(server: Server, host: str) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.handle(self)

        def log_message(self, format: str, *args: object) -> None:
            """Leave the test's output alone."""

    with ThreadingHTTPServer((host, 0), Handler) as http:
        http.daemon_threads = True
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        server.url = f"http://{host}:{http.server_port}"
        yield server
        http.shutdown()


@pytest.fixture
def server() -> Iterator[Server]:
    """A server at an address that the tests allow."""
    yield from serve(Server(), "127.0.0.1")


@pytest.fixture
def private() -> Iterator[Server]:
    """A server at an address that nobody has allowed."""
    yield from serve(Server(answers={"/": reply(b"secret")}), "127.0.0.2")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "PAUSE_S", 0.01)


def reply(body: bytes = b"", status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    def answer(request: BaseHTTPRequestHandler, _: int) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    return answer


def after(num_failures: int, failure: Answer, success: Answer) -> Answer:
    def answer(request: BaseHTTPRequestHandler, num_before: int) -> None:
        (failure if num_before < num_failures else success)(request, num_before)

    return answer


def get(tmp_path: Path, addresses: list[str], **settings: Any) -> Download:
    rows = [
        Row(index=i, key=str(i), address=address, caption="c", columns={}, is_duplicate=False)
        for i, address in enumerate(addresses)
    ]
    scratch = tmp_path / "downloads"
    scratch.mkdir()
    defaults = FetchSettings(
        prefix="",
        folder=tmp_path,
        allow_addresses=("127.0.0.1",),
        timeout_s=5,
        retries=2,
        threads=8,
        max_bytes=64 * KIB,
    )
    return fetch(rows, replace(defaults, **settings), scratch)


def fates(download: Download) -> list[str]:
    """Of each row the bytes of its picture as text, or the reason why there are none."""
    results = [download.pictures[index] for index in sorted(download.pictures)]
    return [one.reason if isinstance(one, Rejection) else one.read_text() for one in results]


# -- retries ---------------------------------------------------------------------------------------


def test_only_failures_that_pass_are_asked_for_again(tmp_path: Path, server: Server) -> None:
    """Timeouts, 429, 5xx and lost connections come again, absent and refused ones do not."""
    cut = reply(b"half", headers={"Content-Length": "8"})
    server.answers = {
        "/fine": reply(b"fine"),
        "/absent": reply(status=404),
        "/gone": reply(status=410),
        "/busy": after(1, reply(status=503), reply(b"busy")),
        "/limited": after(2, reply(status=429), reply(b"limited")),
        "/down": reply(status=500),
        "/cut": after(1, cut, reply(b"cut")),
        "/noai": reply(b"x", headers={"X-Robots-Tag": "noai"}),
    }
    download = get(tmp_path, [server.url + path for path in server.answers])
    assert fates(download) == [
        "fine", "http_404", "http_410", "busy", "limited", "http_500", "cut", "robots_disallowed",
    ]  # fmt: skip
    counts = {path[1:]: server.asked.count(path) for path in server.answers}
    assert counts == {
        "fine": 1, "absent": 1, "gone": 1, "busy": 2, "limited": 3, "down": 3, "cut": 2, "noai": 1,
    }  # fmt: skip
    timings = dict(download.timings)
    assert timings.pop("download_s") > 0
    assert timings == {
        "num_retries_http_503": 1,
        "num_retries_http_429": 2,
        "num_retries_http_500": 2,
        "num_retries_connection_lost": 1,
        "num_recovered_http_503": 1,
        "num_recovered_http_429": 1,
        "num_recovered_connection_lost": 1,
    }


def test_servers_may_ask_for_a_longer_pause(tmp_path: Path, server: Server) -> None:
    """Retry-After is waited for up to a limit, and does not stand in messages."""
    busy = reply(status=503, headers={"Retry-After": "1"})
    server.answers = {"/busy": after(1, busy, reply(b"busy"))}
    start = time.monotonic()
    assert fates(get(tmp_path, [server.url + "/busy"])) == ["busy"]
    assert time.monotonic() - start > 1
    words = "HTTP Error 503: Service Unavailable; Retry-After: 17"
    assert classify(words) == Rejection(
        reason="http_503", message="HTTP Error 503: Service Unavailable"
    )


def test_retries_can_be_turned_off(tmp_path: Path, server: Server) -> None:
    """With no retries every address is asked for once."""
    server.answers = {"/busy": reply(status=503)}
    assert fates(get(tmp_path, [server.url + "/busy"], retries=0)) == ["http_503"]
    assert server.asked == ["/busy"]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("HTTP Error 503: Service Unavailable", "http_503"),
        ("<urlopen error timed out>", "timeout"),
        ("The read operation timed out", "timeout"),
        ("<urlopen error [Errno -2] Name or service not known>", "dead_host"),
        ("Use of image disallowed by X-Robots-Tag directive", "robots_disallowed"),
        ("Remote end closed connection without response", "connection_lost"),
        ("[Errno 104] Connection reset by peer", "connection_lost"),
        ("<urlopen error unknown url type: ftp>", "address_refused"),
        (
            "HTTP Error 302: Found - Redirection to url 'file:///x' is not allowed",
            "address_refused",
        ),
        ("<urlopen error certificate verify failed>", "download_failed"),
    ],
)
def test_download_errors_have_reasons(message: str, reason: str) -> None:
    """The words of a failed download become a countable reason, and are kept."""
    assert classify(message) == Rejection(reason=reason, message=message)


def test_reasons_that_may_pass_are_told_from_those_that_stay() -> None:
    """What `ediffi cache retry` asks for again: the network's faults, and what settings refused."""
    passing = "timeout dead_host connection_lost http_429 http_503 download_failed address_refused"
    staying = (
        "http_404 image_truncated caption_empty robots_disallowed image_too_large file_missing"
    )
    assert all(PASSING_REASONS.fullmatch(reason) for reason in passing.split())
    assert not any(PASSING_REASONS.fullmatch(reason) for reason in staying.split())


def test_an_outage_is_told_from_dead_addresses() -> None:
    """Nothing but passing failures among ten rows or more is to be tried again as a whole."""
    dead = Rejection(reason="dead_host", message="refused")
    with pytest.raises(RetryableError, match=r"none of 10 addresses .*refused"):
        check_outage(dict.fromkeys(range(10), dead))
    check_outage(dict.fromkeys(range(9), dead))
    check_outage({**dict.fromkeys(range(10), dead), 10: Rejection(reason="http_404")})


# -- addresses -------------------------------------------------------------------------------------


def test_private_addresses_are_refused_on_every_way(
    tmp_path: Path, server: Server, private: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Directly, by another spelling, or by a redirect: no connection reaches a private server."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    port = private.url.rpartition(":")[2]
    server.answers = {
        "/redirect": reply(status=302, headers={"Location": private.url + "/"}),
        "/file": reply(status=302, headers={"Location": "file:///etc/passwd"}),
        "/ftp": reply(status=302, headers={"Location": "ftp://127.0.0.1/x"}),
        "/twice": reply(status=302, headers={"Location": server.url + "/redirect"}),
    }
    download = get(
        tmp_path,
        [
            private.url + "/",
            f"http://2130706434:{port}/",
            f"http://[::ffff:127.0.0.2]:{port}/",
            "http://169.254.169.254/latest/meta-data/",
            *(server.url + path for path in server.answers),
            "file:///etc/passwd",
            "FTP://127.0.0.1/x",
        ],
    )
    assert set(fates(download)) == {"address_refused"}
    assert private.asked == []
    refusals = [download.pictures[index] for index in range(len(download.pictures))]
    messages = [one.message for one in refusals if isinstance(one, Rejection)]
    assert "169.254.169.254 is link-local; data.allow_addresses does not list it" in messages[3]
    assert "127.0.0.2 is loopback" in messages[4]
    assert "only http:// and https:// are" in messages[8]
    allowed = ("127.0.0.0/8",)
    (tmp_path / "downloads").rename(tmp_path / "first")
    assert fates(get(tmp_path, [server.url + "/redirect"], allow_addresses=allowed)) == ["secret"]


def test_a_proxy_does_not_open_private_addresses(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes through the environment's proxy is judged by what its name means here."""
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", server.url)
    server.answers = {"http://no-such-host.invalid/a": reply(b"by proxy")}
    addresses = ["http://no-such-host.invalid/a", "http://169.254.169.254/", "http://127.0.0.3/"]
    download = get(tmp_path, addresses, allow_addresses=())
    assert fates(download) == ["by proxy", "address_refused", "address_refused"]
    assert server.asked == ["http://no-such-host.invalid/a"]


def test_addresses_are_resolved_and_quoted() -> None:
    """An address with a scheme stays, one without goes behind the prefix, or is a file."""
    assert resolve_address("http://h/ä%20b?x=1", "http://p/") == "http://h/%C3%A4%20b?x=1"
    assert resolve_address("a b.png", "http://p/") == "http://p/a%20b.png"
    assert resolve_address("a b.png", "") == ""
    refused = resolve_address("file:///etc/passwd", "http://p/")
    assert isinstance(refused, Rejection)
    assert refused.reason == "address_refused"


def test_relative_addresses_are_files_beside_the_list(tmp_path: Path) -> None:
    """Without a prefix nothing is downloaded: files are read where they lie, if not too large."""
    (tmp_path / "a b.png").write_text("a file")
    (tmp_path / "large.png").write_bytes(b"x" * (64 * KIB + 1))
    download = get(tmp_path, ["a b.png", "large.png", "../x", "no.png"])
    assert fates(download) == ["a file", "image_too_large", "path_unsafe", "file_missing"]
    assert download.timings == {}


# -- limits ----------------------------------------------------------------------------------------


def test_large_pictures_are_given_up_early(tmp_path: Path, server: Server) -> None:
    """A picture above the limit is refused by its announced length, or as soon as it is passed."""
    sent = []

    def endless(request: BaseHTTPRequestHandler, _: int) -> None:
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        try:
            for _ in range(10_000):
                request.wfile.write(b"1000\r\n" + b"x" * 4096 + b"\r\n")
                sent.append(4096)
        except OSError:
            return

    server.answers = {
        "/announced": reply(b"x", headers={"Content-Length": str(10**12)}),
        "/endless": endless,
        "/fits": reply(b"x" * 64 * KIB),
        "/redirect": reply(b"x", 302, {"Location": "/fits", "Content-Length": str(10**12)}),
    }
    download = get(tmp_path, [server.url + path for path in server.answers])
    assert fates(download)[:2] == ["image_too_large", "image_too_large"]
    assert fates(download)[2] == "x" * 64 * KIB
    assert fates(download)[3] == "image_too_large"
    assert sum(sent) < 10_000 * 4096
    first = download.pictures[0]
    assert isinstance(first, Rejection)
    assert "1000000000000 bytes announced, at most 65536 allowed" in first.message


def test_a_trickling_server_does_not_hold_the_unit(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that sends a byte now and then, in body or header, is given up in time."""

    def trickle(request: BaseHTTPRequestHandler, _: int) -> None:
        try:
            if request.path == "/body":
                request.send_response(200)
                request.end_headers()
            for _ in range(100):
                request.wfile.write(b"x")
                request.wfile.flush()
                time.sleep(0.2)
        except OSError:
            return

    monkeypatch.setattr(fetching, "PICTURE_TIMEOUTS", 1)
    server.answers = {"/body": trickle, "/header": trickle, "/fine": reply(b"fine")}
    start = time.monotonic()
    download = get(tmp_path, [server.url + path for path in server.answers], timeout_s=1, retries=0)
    assert fates(download)[0] == "timeout"
    assert fates(download)[1] in {"timeout", "connection_lost", "download_failed"}
    assert fates(download)[2] == "fine"
    assert time.monotonic() - start < 15


# -- the process -----------------------------------------------------------------------------------


def test_a_failing_downloader_is_quoted(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When img2dataset's process ends badly, the error has its exit code and last words."""
    monkeypatch.setattr("pipelines.stages.ingestion.fetch.os.getpid", lambda: 1)
    with pytest.raises(RetryableError, match=r"exit code 1; it said:\nparent process 1 is gone"):
        get(tmp_path, [server.url + "/x"])


def test_a_downloader_that_does_not_end_is_given_up(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process beyond its patience is an error that says how long that was."""

    def expire(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("img2dataset", 1)

    monkeypatch.setattr(fetching, "_run", expire)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "last words")
    with pytest.raises(RetryableError, match=r"no end after 155 s; it said:\nlast words"):
        get(tmp_path, [server.url + "/x"])
