"""A store over HTTP that fails: a proxy between clients and a server that speaks S3.

It forwards bytes and, while an outage lasts, spoils every connection in one way. It knows nothing
of HTTP but how a response begins, so that whatever a client does reaches the server as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

KINDS = ("busy", "refused", "stall", "cut", "absent")
CHUNK_BYTES = 65536
_BODY = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{words}</Message></Error>"
_ANSWERS = {
    "busy": ("503 Service Unavailable", "SlowDown", "Please reduce your request rate."),
    "refused": ("403 Forbidden", "AccessDenied", "Access Denied"),
}


class Outage:
    """The proxy; `begin` and `end` may be called from any thread.

    Kinds of outage:
        busy: every request is answered with 503.
        refused: every request is answered with 403, as when credentials have run out.
        stall: nothing moves, in either direction, on any connection.
        cut: connections are reset, some in the middle of a response.
        absent: nothing listens any more.
    """

    def __init__(self, server_port: int, chance: random.Random) -> None:
        self._server_port, self._chance = server_port, chance
        self._kind = ""
        self._loop = asyncio.new_event_loop()
        self._moves = asyncio.Event()
        self._connections: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.port = 0
        self.num_spoilt = 0  # requests and connections that an outage has hit
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def begin(self, kind: str) -> None:
        """From now on everything goes wrong in this way."""
        assert kind in KINDS, kind
        self._call(lambda: self._begin(kind))

    def end(self) -> None:
        """All is well again."""
        self._call(self._end)

    def last(self, kind: str, seconds: float) -> None:
        """An outage of so many seconds."""
        self.begin(kind)
        time.sleep(seconds)
        self.end()

    # -- what the loop does ----------------------------------------------------------------------

    def _call(self, act: Callable[[], object]) -> None:
        async def work() -> None:
            result = act()
            if asyncio.iscoroutine(result):
                await result

        asyncio.run_coroutine_threadsafe(work(), self._loop).result(30)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _begin(self, kind: str) -> None:
        self._kind = kind
        self._moves.clear()
        if kind == "absent" and self._server is not None:
            self._server.close()
            self._server = None
        if kind in {"cut", "absent"}:
            for connection in list(self._connections):
                self._reset(connection)

    async def _end(self) -> None:
        self._kind = ""
        self._moves.set()
        if self._server is None:
            await self._listen()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
            try:
                await self._pass_on_both(reader, writer, up_reader, up_writer)
            finally:
                up_writer.close()
        except (OSError, asyncio.IncompleteReadError):
            pass  # either side has hung up
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _pass_on_both(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
    ) -> None:
        ways = [
            asyncio.ensure_future(self._requests(reader, up_writer, writer)),
            asyncio.ensure_future(self._responses(up_reader, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _requests(
        self,
        reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
        writer: asyncio.StreamWriter,
    ) -> None:
        """From the client to the server; ends when the connection is no good any more."""
        while chunk := await reader.read(CHUNK_BYTES):
            if self._kind in _ANSWERS:
                await self._answer(reader, writer)
                return
            await self._wait_out_stall()
            if self._kind == "cut":
                self._reset(writer)
                return
            up_writer.write(chunk)
            await up_writer.drain()

    async def _responses(
        self, up_reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while chunk := await up_reader.read(CHUNK_BYTES):
            await self._wait_out_stall()
            if self._kind == "cut":
                writer.write(chunk[: self._chance.randint(0, len(chunk) - 1)])
                await writer.drain()
                self._reset(writer)
                return
            writer.write(chunk)
            await writer.drain()

    async def _wait_out_stall(self) -> None:
        if self._kind == "stall":
            self.num_spoilt += 1
            await self._moves.wait()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """An error in place of what the server would have said; then the connection is closed."""
        self.num_spoilt += 1
        status, code, words = _ANSWERS[self._kind]
        with contextlib.suppress(TimeoutError):  # let the body arrive, else the answer is lost
            while await asyncio.wait_for(reader.read(CHUNK_BYTES), 0.1):
                pass
        body = _BODY.format(code=code, words=words)
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        await writer.drain()

    def _reset(self, writer: asyncio.StreamWriter) -> None:
        """End a connection as a machine that has gone does: the other side sees it at once."""
        self.num_spoilt += 1
        connection = writer.get_extra_info("socket")
        if connection is not None:
            with contextlib.suppress(OSError):
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()


@contextmanager
def outage_before(server_port: int, chance: random.Random) -> Iterator[Outage]:
    """A proxy before a server of this machine, for as long as the context."""
    outage = Outage(server_port, chance)
    outage._thread.start()
    outage._call(outage._end)
    try:
        yield outage
    finally:
        outage.end()
        outage._loop.call_soon_threadsafe(outage._loop.stop)
        outage._thread.join(10)
