"""A server before the S3 server, that lets requests through or spoils them, as a test says."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

_DENIED = (
    b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code>"
    b"<Message>The provided token has expired.</Message></Error>"
)


class Faults:
    """What is wrong at the moment.

    Attributes:
        ignores_conditions: conditional requests are taken for plain ones.
        refuses: methods answered with 403, as when credentials ran out.
    """

    def __init__(self) -> None:
        self.ignores_conditions = False
        self.refuses: frozenset[str] = frozenset()


@contextmanager
def failing_store(behind_port: int) -> Iterator[tuple[int, Faults]]:
    """Yields the port of such a server on loopback, and what can be made to go wrong."""
    faults = Faults()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(behind_port, faults))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port, faults
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(behind_port: int, faults: Faults) -> Callable[..., BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.command in faults.refuses:
                self.answer(403, [("Content-Type", "application/xml")], _DENIED)
                return
            headers = dict(self.headers)
            if faults.ignores_conditions:
                headers.pop("If-None-Match", None)
            connection = http.client.HTTPConnection("127.0.0.1", behind_port)
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            told = [(name, value) for name, value in answer.getheaders() if name not in _HOPS]
            self.answer(answer.status, told, answer.read())
            connection.close()

        def answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            self.send_response(status)
            length = str(len(body))
            for name, value in headers:
                if name.lower() == "content-length" and self.command == "HEAD":
                    length = value
                elif name.lower() != "content-length":
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = pass_on

        def log_message(self, *_: object) -> None:
            """Nobody wants to read it."""

    return Handler


_HOPS = ("Connection", "Transfer-Encoding", "Date", "Server")
