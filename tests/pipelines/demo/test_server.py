"""The loopback file server: what it serves, what it refuses, and that it stops."""

import http.client
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.demo.server import serve_directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory to serve, with a secret beside it and a link that leads there."""
    served = tmp_path / "served"
    (served / "pictures").mkdir(parents=True)
    (served / "pictures" / "one.png").write_bytes(b"first picture")
    (served / "captions.parquet").write_bytes(b"captions")
    (tmp_path / "secret").write_bytes(b"secret")
    (served / "link").symlink_to(tmp_path / "secret")
    return served


@pytest.fixture
def connection(directory: Path) -> Iterator[http.client.HTTPConnection]:
    """One keep-alive connection to a server of ``directory``."""
    with serve_directory(directory) as url:
        client = connect(url)
        yield client
        client.close()


def connect(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=10)


def get(connection: http.client.HTTPConnection, path: str) -> tuple[int, bytes]:
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read()


def test_files_are_served(connection: http.client.HTTPConnection) -> None:
    """A file comes back byte for byte, from a folder below too."""
    assert get(connection, "/pictures/one.png") == (200, b"first picture")


def test_a_connection_serves_several_requests(connection: http.client.HTTPConnection) -> None:
    """Keep-alive: the second request travels over the socket of the first."""
    get(connection, "/captions.parquet")
    socket = connection.sock
    assert get(connection, "/pictures/one.png")[0] == 200
    assert connection.sock is socket is not None


@pytest.mark.parametrize(
    "path",
    [
        "/missing.png",
        "/",
        "/pictures",
        "/pictures/",
        "/../secret",
        "/%2e%2e/secret",
        "/pictures/../../secret",
        "/link",
    ],
)
def test_everything_else_is_not_found(connection: http.client.HTTPConnection, path: str) -> None:
    """Missing files, directories, and every way out of the directory answer 404."""
    status, body = get(connection, path)
    assert status == 404
    assert b"one.png" not in body
    assert body != b"secret"


def test_a_missing_file_does_not_stop_the_server(connection: http.client.HTTPConnection) -> None:
    """After a 404 the next request is served."""
    assert get(connection, "/missing.png")[0] == 404
    assert get(connection, "/captions.parquet") == (200, b"captions")


def test_many_clients_are_served_at_once(directory: Path) -> None:
    """A crowd of connections, opened before any is used, all get their file."""
    with serve_directory(directory) as url, ThreadPoolExecutor(16) as pool:
        clients = [connect(url) for _ in range(32)]
        for client in clients:
            client.connect()
        answers = list(pool.map(lambda client: get(client, "/pictures/one.png"), clients))
        for client in clients:
            client.close()
    assert answers == [(200, b"first picture")] * 32


def test_only_loopback_is_bound(directory: Path) -> None:
    """The address is 127.0.0.1 at a free port, without a slash at its end."""
    with serve_directory(directory) as first, serve_directory(directory) as second:
        hosts = [urllib.parse.urlsplit(url).hostname for url in (first, second)]
        assert hosts == ["127.0.0.1", "127.0.0.1"]
        assert first != second
        assert not first.endswith("/")


def test_the_server_is_quiet(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Requests, good and bad, and a client that hangs up print nothing."""
    with serve_directory(directory) as url:
        client = connect(url)
        get(client, "/captions.parquet")
        get(client, "/missing.png")
        client.close()
    assert capfd.readouterr() == ("", "")


def test_the_server_stops(directory: Path) -> None:
    """After the block nothing listens at the address any more."""
    with serve_directory(directory) as url:
        pass
    with pytest.raises(ConnectionRefusedError):
        connect(url).connect()


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    """Serving what is not there is an error at once, not a server of 404s."""
    with pytest.raises(ValueError, match="existing directory"), serve_directory(tmp_path / "none"):
        pass
