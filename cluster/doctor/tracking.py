"""Can runs be logged at an MLflow tracking URI, and does its server's clock agree with ours?

Passwords in it are never shown.
"""

import base64
import os
import socket
import sqlite3
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from cluster.doctor.clock import check_clock, seconds_of_date
from cluster.doctor.finding import TIMEOUT_S, Finding, nearest_directory, reason

NAME = "tracking"
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def check_tracking(uri: str, timeout_s: float = TIMEOUT_S) -> list[Finding]:
    """Ask the database or server; of a server that answers also what time it is."""
    parts = urlsplit(uri)
    if parts.scheme == "sqlite":
        return [_check_sqlite(Path(uri.removeprefix("sqlite:///").partition("?")[0]))]
    if parts.scheme in ("http", "https"):
        return _check_server(parts, timeout_s)
    if parts.scheme.partition("+")[0] in PORTS:
        return [_check_database(parts, timeout_s)]
    remedy = "use sqlite:///PATH, http(s)://HOST or a database URI: MLflow refuses plain folders"
    return [Finding(name=NAME, ok=False, found=f"{parts.scheme or 'no'} scheme", remedy=remedy)]


def _check_sqlite(path: Path) -> Finding:
    """Take the database's write lock and let it go; of a new one, only its folder is tried."""
    try:
        if path.exists():
            connection = sqlite3.connect(path, timeout=TIMEOUT_S, isolation_level=None)
            try:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
            finally:
                connection.close()
        else:
            probe = nearest_directory(path.parent) / f".doctor-{uuid.uuid4().hex}"
            probe.touch(exist_ok=False)
            probe.unlink()
    except (OSError, sqlite3.Error) as error:
        remedy = "name a database file that this user may write to, on a local disk"
        return Finding(name=NAME, ok=False, found=f"{path}: {reason(error)}", remedy=remedy)
    return Finding(name=NAME, ok=True, found=f"{path}: writable")


def _check_database(parts: SplitResult, timeout_s: float) -> Finding:
    """Does somebody listen there? Logging in needs the database's own library."""
    kind = parts.scheme.partition("+")[0]
    try:
        address = (parts.hostname or "localhost", parts.port or PORTS[kind])
        socket.create_connection(address, timeout=timeout_s).close()
    except (OSError, ValueError) as error:
        remedy = f"start the {kind} server, open its port to this machine, or mend the URI"
        found = f"{kind} at {parts.hostname}: {reason(error)}"
        return Finding(name=NAME, ok=False, found=found, remedy=remedy)
    return Finding(name=NAME, ok=True, found=f"{kind} at {address[0]}:{address[1]} listens")


def _check_server(parts: SplitResult, timeout_s: float) -> list[Finding]:
    """Ask /health, which needs no password, then for an experiment, which may need one."""
    server = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
    before = time.time()
    try:
        with urllib.request.urlopen(f"{server}/health", timeout=timeout_s) as answer:
            date, found = answer.headers.get("Date", ""), f"{server}: {answer.status}"
        after = time.time()
        is_let_in = _is_let_in(server, parts, timeout_s)
    except (OSError, ValueError) as error:
        remedy = (
            "start it (`mlflow server --backend-store-uri sqlite:///mlflow.db`) or mend the URI"
        )
        found = f"{server}: {reason(error)}"
        return [Finding(name=NAME, ok=False, found=found, remedy=remedy)]
    if not is_let_in:
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or their TOKEN"
        return [Finding(name=NAME, ok=False, found=f"{server}: lets us not in", remedy=remedy)]
    findings = [Finding(name=NAME, ok=True, found=found)]
    if date:
        theirs = seconds_of_date(date)
        findings.append(check_clock("tracking's clock", theirs, before, after, resolution_s=1.0))
    return findings


def _is_let_in(server: str, parts: SplitResult, timeout_s: float) -> bool:
    """Whether the API takes our credentials; what else it answers is not asked here."""
    request = urllib.request.Request(f"{server}/api/2.0/mlflow/experiments/search?max_results=1")
    user = unquote(parts.username or "") or os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    password = unquote(parts.password or "") or os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    if user:
        code = base64.b64encode(f"{user}:{password}".encode()).decode()
        request.add_header("Authorization", f"Basic {code}")
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        urllib.request.urlopen(request, timeout=timeout_s).close()
    except urllib.error.HTTPError as error:
        return error.code not in (401, 403)
    return True
