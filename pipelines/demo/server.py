"""A web server for one directory on this machine, so that the demo downloads without a network."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO


class _Handler(SimpleHTTPRequestHandler):
    """Serves files below its directory: no listings, and no links that lead out of it."""

    protocol_version = "HTTP/1.1"  # keep-alive
    timeout = 10  # seconds after which an idle connection gives its thread back
    disable_nagle_algorithm = True  # headers and body are two writes: 40 ms per file otherwise

    def send_head(self) -> BinaryIO | None:
        path = Path(self.translate_path(self.path)).resolve()
        if not path.is_file() or not path.is_relative_to(Path(self.directory).resolve()):
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        return super().send_head()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: stderr belongs to the pipeline's narration."""


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # a downloader opens many connections at once; the default is 5

    def handle_error(self, request: object, client_address: object) -> None:
        """Let clients hang up without a traceback; anything else is printed as usual."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@contextlib.contextmanager
def serve_directory(directory: Path) -> Iterator[str]:
    """Serve ``directory`` on 127.0.0.1, at a free port; yield the base URL, no slash at its end.

    Raises ValueError when ``directory`` is not a directory.
    """
    if not directory.is_dir():
        raise ValueError(f"directory must be an existing directory; got {directory}.")
    with _Server(("127.0.0.1", 0), partial(_Handler, directory=str(directory))) as server:
        # Stopping waits for one poll, so polls are short.
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
