"""urllib as the downloader may use it: http and https only, guarded addresses, bounded pictures.

img2dataset reads whole responses through `urllib.request.urlopen`. `install` replaces what that
opens: a picture above the size limit is given up before more of it is read, one that trickles in
is given up after a while, and a response that ends early is an error.

Nothing of ours is imported here: the downloader's process loads this file by itself.
"""

from __future__ import annotations

import http.client
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

TOO_LARGE = "image too large"  # begins the message of every refusal for size
RETRY_AFTER = "; Retry-After: "  # appended to the words of an HTTP error that has the header
_PIECE_BYTES = 1 << 18
_WATCH_S = 0.5


class Guard(Protocol):
    """What decides about addresses: `address_guard.AddressGuard`."""

    def enter(self, host: str, proxy: str = "") -> None:
        """Announce a request of this thread."""


class PictureTooLarge(OSError):
    """A response has more bytes than a picture may have."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much of a response is read, and for how long."""

    max_bytes: int
    max_s: float


def install(guard: Guard, limits: Limits) -> None:
    """Make `urllib.request.urlopen` of this process guarded and bounded."""
    opener = urllib.request.OpenerDirector()
    watchdog = _Watchdog(limits.max_s)
    for handler in (  # without those for file:, ftp: and data:
        urllib.request.ProxyHandler(),
        _Http(guard, watchdog),
        _Https(guard, watchdog),
        _Bounded(limits),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    urllib.request.install_opener(opener)


# -- connections ----------------------------------------------------------------------------------


@dataclass
class _Watchdog:
    """Shuts sockets down that are still in use after `max_s`, whatever trickles in.

    A timeout of the socket counts from byte to byte, so a server could hold a thread for hours.
    """

    max_s: float
    _watched: list[tuple[float, socket.socket]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def watch(self, connection: socket.socket) -> None:
        with self._lock:
            self._watched.append((time.monotonic() + self.max_s, connection))

    def _run(self) -> None:
        while True:
            time.sleep(_WATCH_S)
            now = time.monotonic()
            with self._lock:
                late = [connection for end, connection in self._watched if end < now]
                self._watched = [
                    (end, connection)
                    for end, connection in self._watched
                    if end >= now and connection.fileno() >= 0
                ]
            for connection in late:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:  # closed meanwhile: the download has ended
                    continue


def _watched(kind: type[http.client.HTTPConnection], watchdog: _Watchdog) -> Any:
    """A connection class whose sockets are watched from the moment they are open."""

    class Watched(kind):  # type: ignore[valid-type, misc]
        def connect(self) -> None:
            super().connect()
            watchdog.watch(self.sock)

    return Watched


def _announce(guard: Guard, request: urllib.request.Request) -> None:
    """Tell the guard where a request goes; urllib has put a proxy in the host's place by now."""
    target = urlsplit(request.full_url)
    is_proxied = request.host != unquote(target.netloc)
    proxy = urlsplit(f"//{request.host}").hostname if is_proxied else ""
    guard.enter(target.hostname or "", proxy or "")


class _Http(urllib.request.HTTPHandler):
    def __init__(self, guard: Guard, watchdog: _Watchdog) -> None:
        super().__init__()
        self._guard = guard
        self._connection = _watched(http.client.HTTPConnection, watchdog)

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        _announce(self._guard, request)
        return self.do_open(self._connection, request)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, guard: Guard, watchdog: _Watchdog) -> None:
        super().__init__()
        self._guard = guard
        self._connection = _watched(http.client.HTTPSConnection, watchdog)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        _announce(self._guard, request)
        return self.do_open(self._connection, request)


# -- responses ------------------------------------------------------------------------------------


class _Bounded(urllib.request.BaseHandler):
    """Bounds every response, those of redirects and errors too (it comes before their handlers)."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def http_response(self, request: urllib.request.Request, response: Any) -> Any:
        response.read = _bounded_read(response, self._limits)
        if retry_after := response.headers.get("Retry-After"):
            response.msg = f"{response.msg}{RETRY_AFTER}{retry_after}"
        return response

    https_response = http_response


def _bounded_read(response: Any, limits: Limits) -> Callable[[], bytes]:
    end = time.monotonic() + limits.max_s

    def read() -> bytes:
        announced = response.length  # None: chunked, or until the connection closes
        if announced is not None and announced > limits.max_bytes:
            raise PictureTooLarge(
                f"{TOO_LARGE}: {announced} bytes announced, at most {limits.max_bytes} allowed"
            )
        pieces, num_bytes = [], 0
        while announced is None or num_bytes < announced:
            left_bytes = _PIECE_BYTES if announced is None else announced - num_bytes
            piece = response.read1(min(left_bytes, _PIECE_BYTES))
            if time.monotonic() > end:
                raise TimeoutError(f"timed out: the picture was not whole after {limits.max_s} s")
            if not piece:
                break
            pieces.append(piece)
            num_bytes += len(piece)
            if num_bytes > limits.max_bytes:
                raise PictureTooLarge(f"{TOO_LARGE}: more than {limits.max_bytes} bytes")
        if announced is not None and num_bytes < announced:
            raise http.client.IncompleteRead(b"".join(pieces), announced - num_bytes)
        return b"".join(pieces)

    return read
